"""VGGT ahead of an optimizer step: the numbers of a run that encodes in each micro-step, and a plan that sees it."""

from typing import NamedTuple

import pytest
import tiny_plan
import torch

from benchmarks.random_weights import fill_with_random
from hf_vla.assemble import build_config, build_on_meta
from hf_vla.memory.cuda_rules import no_workspace
from hf_vla.memory.planner import plan_recipe
from hf_vla.memory.trace import rehearse, trace, without_cycles
from hf_vla.memory.tracker import MemoryTracker
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe, RecipeError, make_recipe
from hf_vla.trainer import VLATrainer
from tests.tiny_run import tiny_recipe

BATCH, ACCUMULATION, STEPS = 4, 3, 2
STEP = BATCH * ACCUMULATION
FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
HALF = {"float32": {"bf16": False}, "bfloat16": {"bf16": True}}


def recipe(encode_ahead: int, dtype: str = "float32", **training) -> Recipe:
    """A recipe with everything random that a frozen VGGT leaves: dropout in fusion and adapters, draws of the flow head."""
    plan = {"max_steps": STEPS, "gradient_accumulation_steps": ACCUMULATION, "logging_steps": 1, "save_strategy": "no"}
    return tiny_recipe(
        model={**FROZEN, "dtype": dtype, "fusion": {"dropout": 0.2}, "head": {"type": "flow"}},
        lora={"apply_to": ["lang_encoder"], "r": 4, "lora_dropout": 0.2},
        memory={"encode_ahead": encode_ahead},
        training={**plan, "adam_epsilon": 1e-3, **HALF[dtype], **training},
    )


class Outcome(NamedTuple):
    """What a run came to."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    pairs: list[int]
    """That went through VGGT at once, each time it ran."""


def run(trainer: VLATrainer) -> Outcome:
    model, pairs = trainer.bare_model(), []
    model.model.vggt.register_forward_pre_hook(lambda module, args: pairs.append(len(args[0])))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return Outcome(losses, weights, pairs)


@pytest.fixture(scope="module", params=HALF)
def each_its_own(request, tmp_path_factory) -> tuple[str, Outcome]:
    """A precision, and the run whose micro-steps encode their own pairs."""
    outcome = run(build_trainer(recipe(0, request.param), tmp_path_factory.mktemp(request.param)))
    assert outcome.pairs == [BATCH] * ACCUMULATION * STEPS
    return request.param, outcome


def test_as_many_pairs_at_once_as_a_micro_batch_give_the_same_bits(tmp_path, each_its_own):
    dtype, expected = each_its_own
    assert run(build_trainer(recipe(BATCH, dtype), tmp_path)).losses == expected.losses
    # and the same weights, as the losses of the second step show already


@pytest.mark.parametrize(
    ("encode_ahead", "pairs"), [(2, [2] * 6), (5, [5, 5, 2]), (STEP, [STEP]), (99, [STEP])], ids=str
)
def test_however_many_go_at_once_the_run_is_the_same(tmp_path, each_its_own, encode_ahead, pairs):
    dtype, expected = each_its_own
    outcome = run(build_trainer(recipe(encode_ahead, dtype), tmp_path))
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert outcome.pairs == pairs * STEPS  # and no micro-step ran it again
    assert outcome.losses == pytest.approx(expected.losses, rel=tolerance)
    for name, weight in outcome.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=tolerance, atol=1e-6, msg=name)


def test_an_epochs_last_step_may_be_short(tmp_path):
    plan = {"max_steps": -1, "num_train_epochs": 1}
    trainer = build_trainer(recipe(STEP, **plan), tmp_path / "ahead")
    samples = len(trainer.train_dataset)
    assert samples % STEP
    outcome = run(trainer)
    assert outcome.pairs == [STEP] * (samples // STEP) + [samples % STEP]
    assert outcome.losses == pytest.approx(run(build_trainer(recipe(0, **plan), tmp_path / "own")).losses, rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"memory": {"encode_ahead": -1}}, "encode_ahead is -1: input should be greater"),
        ({"model": {"freeze_vggt": False}}, "VGGT trains"),
        ({"lora": {"apply_to": ["vggt"]}}, "VGGT trains"),
        ({"memory": {"encode_ahead": 8, "cache": ["vggt"]}}, "memory.cache names 'vggt'"),
        ({"model": {"fusion": {"type": "prefix", "align_weight": 0.5}}}, "look at the pictures"),
        ({"training": {"fsdp": "full_shard"}}, "sharded weights"),
        ({"memory": {"encode_overlap": True}}, "encode_overlap is true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cant_run_ahead_is_refused(sections, words):
    with pytest.raises(RecipeError, match=words):
        make_recipe({"memory": {"encode_ahead": 8}, **sections})


def planned(encode_ahead: int, **sections: dict) -> Recipe:
    raw = {
        "lora": {"apply_to": ["lang_encoder"]},
        "training": {"gradient_accumulation_steps": 4},
        "memory": {"encode_ahead": encode_ahead},
        "data": {"batch_size": 2, "image_size": 112},
    }
    return tiny_plan.tiny_recipe(
        **{name: {**raw.get(name, {}), **sections.get(name, {})} for name in {**raw, **sections}}
    )


@pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlapped"])
@pytest.mark.parametrize("encode_ahead", [3, 8])
def test_what_is_traced_is_what_real_tensors_take(encode_ahead, overlap):
    sections = {"model": {"dtype": "float32"}, "training": {"bf16": False}, "data": {"image_size": 28}}
    plan = planned(encode_ahead, memory={"encode_overlap": overlap}, **sections)
    shapes = tiny_plan.SHAPES
    fake = trace(plan, shapes, extent="two steps", workspace=no_workspace).ledger
    tracker = MemoryTracker()
    model = build_on_meta(plan, build_config(plan, shapes.num_views, shapes.state_dim, shapes.action_dim))
    with without_cycles():
        rehearse(plan, model, shapes, plan.data.batch_size, tracker, fill_with_random, "two steps")
    real = tracker.ledger()
    assert fake.peak("encoding")[0] == real.peak("encoding")[0] > 0
    assert fake.peak()[0] == pytest.approx(real.peak()[0], rel=1e-3)  # without VGGT ahead there is that difference too


def test_the_plan_counts_it():
    own, few, many = (plan_recipe(planned(n), shapes=tiny_plan.SHAPES) for n in (0, 1, 8))
    assert few.flops == pytest.approx(own.flops)
    assert many.flops == pytest.approx(own.flops)
    assert few.samples_per_second < own.samples_per_second < many.samples_per_second
    assert few.phases["encoding"] < many.phases["encoding"]
    assert few.phases["forward"] < own.phases["forward"]
    assert any("8 pairs at once" in note for note in many.notes)
    assert "encoding" not in own.phases


def test_the_plan_counts_what_the_next_steps_pairs_take_beside_this_one():
    in_turn, beside = (
        plan_recipe(planned(8, memory={"encode_overlap": overlap}), shapes=tiny_plan.SHAPES)
        for overlap in (False, True)
    )
    features = 8 * tiny_plan.SHAPES.num_views * 2**2 * 2 * tiny_plan.VGGT["embed_dim"] * 2  # g = 2; 2 bytes each
    for phase in ("encoding", "forward", "saving"):
        assert features <= beside.phases[phase] - in_turn.phases[phase] < 2 * features  # small tensors too
    lines, before = ({line.name: line.bytes for line in plan.lines} for plan in (beside, in_turn))
    assert lines["cuBLAS workspaces"] == 2 * before["cuBLAS workspaces"]
    passing = beside.phases["encoding"] - beside.phases["saving"]  # VGGT's activations, and little else
    pools = beside.tensor_peak + lines["fragmentation"] + lines["VGGT's stream"]
    assert pools >= beside.phases["forward"] + passing
    assert beside.samples_per_second == pytest.approx(in_turn.samples_per_second, rel=0.01)
    assert any("nobody has measured" in note for note in beside.notes)
