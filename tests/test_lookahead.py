"""VGGT of the next step beside the training on this one: the numbers of a run that encodes each step's pairs before it."""

from contextlib import contextmanager

import pytest
import torch

from hf_vla.memory.lookahead import Lookahead
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe
from hf_vla.trainer import VLATrainer
from tests.test_encode_ahead import ACCUMULATION, BATCH, HALF, STEP, Outcome, recipe, run

EPOCHS = {"max_steps": -1, "num_train_epochs": 2}


def overlapped(plan: Recipe) -> Recipe:
    plan.memory.encode_overlap = True
    return plan


def assert_same_bits(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.losses == expected.losses
    assert outcome.pairs == expected.pairs  # each pair went through VGGT once, with the same others
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in outcome.weights.items())


def order_of(trainer: VLATrainer) -> list[str]:
    """Note who runs: V for VGGT, t for a micro-step of training."""
    order, model = [], trainer.bare_model().model
    model.vggt.register_forward_pre_hook(lambda module, args: order.append("V"))
    model.fusion.register_forward_pre_hook(lambda module, args: order.append("t"))
    return order


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pairs", [5, STEP], ids=str)
def test_the_run_is_the_same_to_the_last_bit(tmp_path, pairs, dtype):
    """Over two epochs, whose last steps are short."""
    in_turn = run(build_trainer(recipe(pairs, dtype, **EPOCHS), tmp_path / "in_turn"))
    assert_same_bits(run(build_trainer(overlapped(recipe(pairs, dtype, **EPOCHS)), tmp_path / "beside")), in_turn)


def test_the_next_step_is_encoded_before_this_one_trains_and_no_epoch_reads_the_next(tmp_path):
    trainer = build_trainer(overlapped(recipe(STEP, **EPOCHS)), tmp_path)
    order = order_of(trainer)
    trainer.train()
    whole, rest = divmod(len(trainer.train_dataset), STEP)
    assert rest > 0
    last = -(-rest // BATCH) * "t"
    assert "".join(order) == 2 * ("V" + whole * ("V" + ACCUMULATION * "t") + last)


def test_batches_of_an_epoch_that_ended_early_are_not_handed_out_in_the_next(tmp_path):
    trainer = build_trainer(overlapped(recipe(STEP)), tmp_path)
    first, second = (iter(trainer.get_train_dataloader()) for _ in range(2))
    count = trainer.lookahead.over(first)
    batches = [next(count) for _ in range(ACCUMULATION)]
    trainer.lookahead.run(batches)
    assert all("view_features" in batch for batch in batches)
    assert "pixel_values" in next(trainer.lookahead.over(second))


class Stream:
    """Stands in for a CUDA stream: notes who waits for whom."""

    def __init__(self, name: str, order: list[str]):
        self.name, self._order = name, order

    def wait_stream(self, other: "Stream") -> None:
        self._order.append(f"{self.name} waits for {other.name}")


def test_each_stream_waits_for_the_other_where_it_must(tmp_path, monkeypatch):
    order: list[str] = []
    own, current = Stream("own", order), [Stream("training", order)]

    @contextmanager
    def enter(stream):
        current.append(stream or current[-1])
        yield
        current.pop()

    trainer = build_trainer(overlapped(recipe(STEP, max_steps=4)), tmp_path)
    for name, stand_in in {"Stream": lambda _: own, "current_stream": lambda: current[-1], "stream": enter}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    lookahead = Lookahead(trainer.ahead, ACCUMULATION, torch.device("cuda"), trainer.tell)
    trainer.lookahead = lookahead
    model = trainer.bare_model().model
    model.vggt.register_forward_pre_hook(lambda *_: order.append(f"VGGT on {current[-1].name}"))
    model.fusion.register_forward_pre_hook(lambda *_: order.append(f"training on {current[-1].name}"))
    monkeypatch.setattr(trainer, "_clip_grad_norm", lambda _: trainer.state.global_step == 1 and lookahead.give_up())
    trainer.train()
    train = ACCUMULATION * ["training on training"]
    assert order == [
        # The first step has nothing encoded; what is launched for the second isn't waited for.
        *("own waits for training", "VGGT on own", "training waits for own", "VGGT on own", *train),
        *("own waits for training", "training waits for own", "VGGT on own", *train),
        # Given up: the third still uses what was encoded before, and the fourth encodes where it trains.
        *("own waits for training", "training waits for own", *train),
        *("own waits for training", "VGGT on training", "training waits for own", *train),
    ]


def on_a_gpu(folder, overlap: bool, **training) -> VLATrainer:
    plan = recipe(STEP, max_steps=3, use_cpu=False, **training)
    return build_trainer(overlapped(plan) if overlap else plan, folder)


@pytest.mark.gpu
def test_on_a_gpu_training_waits_for_a_stream_that_is_late(tmp_path):
    """Weights stay as they are, since backward kernels may round otherwise each time; so losses say what features were."""
    expected = run(on_a_gpu(tmp_path / "in_turn", False, learning_rate=0.0)).losses
    trainer = on_a_gpu(tmp_path / "beside", True, learning_rate=0.0)
    trainer.bare_model().model.vggt.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**8))
    assert run(trainer).losses == expected


@pytest.mark.gpu
def test_on_a_gpu_vggt_has_a_stream_of_its_own(tmp_path):
    trainer = on_a_gpu(tmp_path, True)
    model, streams = trainer.bare_model().model, {"vggt": set(), "fusion": set()}
    for name, seen in streams.items():
        getattr(model, name).register_forward_pre_hook(lambda *_, seen=seen: seen.add(torch.cuda.current_stream()))
    trainer.train()
    assert streams["fusion"] == {torch.cuda.default_stream()}
    assert len(streams["vggt"]) == 1
    assert not streams["vggt"] & streams["fusion"]
