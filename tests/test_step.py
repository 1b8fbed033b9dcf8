"""What one training step does beside its arithmetic."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vla.prepare import build_trainer
from tests.tiny_run import tiny_recipe

WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)
"""Operations whose result the host has to wait for, on a GPU."""


class Waits(TorchDispatchMode):
    """Notes each operation that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in WAITS:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fusion", ["cross_attention", "gated", "prefix"])
@pytest.mark.parametrize("head", ["l1", "flow", "discrete"])
def test_a_micro_step_never_waits_for_the_gpu(tmp_path, fusion, head):
    recipe = tiny_recipe(model={"fusion": {"type": fusion, "hidden_size": 32, "num_heads": 2}, "head": {"type": head}})
    trainer = build_trainer(recipe, tmp_path)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    with Waits() as waits:
        trainer.training_step(trainer.model, batch, count)
    assert not waits.seen


class Sent(TorchDispatchMode):
    """Notes of each copy from the host to the device whether the host goes on meanwhile."""

    def __init__(self):
        super().__init__()
        self.without_waiting = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        copies = {torch.ops.aten._to_copy: (result, args[0]), torch.ops.aten.copy_: args[:2]}
        to, source = copies.get(func._overloadpacket, (None, None))
        if to is not None and (source.device.type, to.device.type) == ("cpu", "meta"):
            self.without_waiting.append(kwargs.get("non_blocking", args[2:3] == (True,)))
        return result


@pytest.mark.parametrize("fusion", ["cross_attention", "gated", "prefix"])
@pytest.mark.parametrize("head", ["l1", "flow", "discrete"])
def test_a_batch_is_sent_to_the_device_without_waiting_for_it(tmp_path, monkeypatch, fusion, head):
    recipe = tiny_recipe(model={"fusion": {"type": fusion, "hidden_size": 32, "num_heads": 2}, "head": {"type": head}})
    trainer = build_trainer(recipe, tmp_path)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    tensors = sum(isinstance(value, torch.Tensor) for value in batch.values())
    trainer.model.to("meta")  # a device whose copies are seen, and where whoever looks at a number is told off
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    # It has no kernel for this one.
    monkeypatch.setattr(torch, "_sample_dirichlet", lambda parameters, generator: torch.empty_like(parameters))
    made_of_numbers = mock.patch.object(torch, "tensor", wraps=torch.tensor)  # a copy that no mode sees
    with Sent() as sent, made_of_numbers as made:
        trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], trainer.args.device))
    assert not [call for call in made.call_args_list if "meta" in str(call)]
    assert len(sent.without_waiting) >= tensors
    assert all(sent.without_waiting)


class Attentions(TorchDispatchMode):
    """Notes which kernel each call of attention was dispatched to, in which precision and with which mask."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            self.seen.append((name, args[0].dtype, (kwargs or {}).get("attn_mask")))
        return func(*args, **(kwargs or {}))


def test_attention_asks_for_nothing_that_flash_kernels_lack(tmp_path):
    # What a GPU then runs, only a GPU says: `attention_calls` of benchmarks/gpu_suite.py.
    model = {"dtype": "bfloat16", "freeze_vggt": True, "freeze_lang_encoder": True, "fusion": {"type": "prefix"}}
    recipe = tiny_recipe(model=model, lora={"apply_to": ["lang_encoder"]}, training={"bf16": True})
    trainer = build_trainer(recipe, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with Attentions() as attentions:
        trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], trainer.args.device))
    assert attentions.seen
    assert set(attentions.seen) == {("_scaled_dot_product_flash_attention_for_cpu", torch.bfloat16, None)}


def test_the_loss_is_logged_without_looking_at_it_every_step(tmp_path):
    assert not build_trainer(tiny_recipe(), tmp_path).args.logging_nan_inf_filter


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_parts_train_as_eager_ones_do(tmp_path):
    losses = []
    for parts in ([], ["vggt", "fusion", "head"]):
        trainer = build_trainer(
            tiny_recipe(model={"compile": parts}, training={"max_steps": 3}), tmp_path / str(len(parts))
        )
        names = set(trainer.model.state_dict())
        losses.append(trainer.train().training_loss)
        assert set(trainer.bare_model().state_dict()) == names
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
