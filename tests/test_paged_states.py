"""States of an optimizer in a run that goes on: in pages where they began in pages, and by way of the host."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hf_vla.prepare import build_trainer
from tests.tiny_run import tiny_recipe

PLAN = {"max_steps": 4, "save_steps": 2, "max_grad_norm": 0.0, "lr_scheduler_type": "linear"}


def trainer_of(folder: Path, **training):
    recipe = tiny_recipe(memory={"optimizer_in_backward": True}, training={**PLAN, **training})
    return build_trainer(recipe, folder)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.bare_model().named_parameters()}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_states_come_back_into_pages(tmp_path, monkeypatch):
    base = pytest.importorskip("bitsandbytes.optim.optimizer").Optimizer8bit
    make, pages = base.get_state_buffer, []

    def make_page(optimizer, parameter, dtype=torch.float32):
        pages.append(make(optimizer, parameter, dtype))
        return pages[-1]

    monkeypatch.setattr(base, "get_state_buffer", make_page)
    whole = trainer_of(tmp_path, optim="paged_adamw_8bit")
    whole.train()
    goes_on = trainer_of(tmp_path, optim="paged_adamw_8bit")
    pages.clear()
    goes_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    states = [values[name] for values in goes_on.optimizer.state.values() for name in ("state1", "state2")]
    assert {torch.uint8, torch.float32} == {state.dtype for state in states}  # those of small weights aren't packed
    assert {id(state) for state in states} == {id(page) for page in pages}
    expected = weights_of(whole)
    assert all(torch.equal(weights, expected[name]) for name, weights in weights_of(goes_on).items())


def test_one_of_several_ranks_does_not_read_them_onto_its_gpu(tmp_path, monkeypatch):
    trainer_of(tmp_path).train()
    goes_on = trainer_of(tmp_path)
    goes_on.create_optimizer_and_scheduler(4)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))  # in the place of a GPU
    goes_on._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-2"))
    moments = [values["exp_avg"] for values in goes_on.optimizer.state.values()]
    assert moments and not any(moment.is_meta for moment in moments)
