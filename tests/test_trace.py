import functools

import pytest
import torch
import torch.nn.functional as F
from tiny_plan import LLAMA, SHAPES, VGGT, tiny_recipe

from hf_vla.memory.allocator import reserved_peak
from hf_vla.memory.cuda_rules import FLOAT32, cuda_autocast
from hf_vla.memory.ledger import PHASES, TELLING
from hf_vla.memory.shapes import Shapes
from hf_vla.memory.trace import state_bytes, trace
from hf_vla.recipe import make_recipe

GB = 10**9

BOTH_TRAIN = {"freeze_vggt": False, "freeze_lang_encoder": False}
LORA = {"apply_to": ["lang_encoder"]}
CHECKPOINTED = {"activation_checkpointing": True}
FLOW = {"hidden_size": 64, "num_layers": 2, "type": "flow"}
PREFIX = {"hidden_size": 64, "num_layers": 0, "type": "prefix"}


def peaks(recipe, batch_size: int | None = None) -> dict[str, int]:
    ledger = traced(recipe, batch_size).ledger
    return {phase: ledger.peak(phase)[0] for phase in PHASES[1:]} | {"all": ledger.peak()[0]}


def traced(recipe, batch_size: int | None = None, **options):
    return trace(recipe, SHAPES, batch_size, **options)


def kinds_of(recipe) -> dict[str, int]:
    ledger = traced(recipe).ledger
    table = ledger.breakdown(ledger.peak("step")[1])
    return {kind: sum(row.get(kind, 0) for row in table.values()) for kind in ("weights", "gradients", "optimizer")}


@functools.cache
def lora_peaks() -> dict[str, int]:
    return peaks(tiny_recipe(lora=LORA))


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": LORA, "training": {"gradient_accumulation_steps": 3}},
        {"lora": LORA, "training": {"gradient_accumulation_steps": 3}, "memory": {"encode_ahead": 2}},
        {
            "lora": LORA,
            "training": {"gradient_accumulation_steps": 3},
            "memory": {"encode_ahead": 2, "encode_overlap": True},
        },
        pytest.param(
            {"model": BOTH_TRAIN, "training": {"optim": "adamw_torch", **CHECKPOINTED}}, marks=pytest.mark.slow
        ),
    ],
    ids=["lora, accumulating", "VGGT ahead", "VGGT overlapped", "end to end, foreach, checkpointed"],
)
def test_one_micro_step_beside_warm_states_peaks_as_two_whole_steps_do(sections):
    recipe = tiny_recipe(**sections)
    short, whole = traced(recipe).ledger, traced(recipe, extent="two steps").ledger
    assert [short.peak(phase)[0] for phase in PHASES[1:]] == [whole.peak(phase)[0] for phase in PHASES[1:]]


@pytest.mark.parametrize(
    "sections",
    [
        {"training": CHECKPOINTED},
        pytest.param({"model": {"quantization": "nf4", "head": FLOW}}, marks=pytest.mark.slow),
        pytest.param(
            {"model": {"quantization": "int8", "head": {**FLOW, "type": "discrete"}}}, marks=pytest.mark.slow
        ),
        pytest.param({"lora": {"apply_to": ["vggt"]}, "model": {"fusion": PREFIX}}, marks=pytest.mark.slow),
    ],
    ids=["checkpointed", "nf4, flow", "int8, discrete", "LoRA on VGGT, prefix"],
)
def test_one_micro_batch_tells_every_other_exactly(sections):
    recipe = tiny_recipe(**{"lora": LORA, **sections})
    told, itself = traced(recipe, TELLING).at_batch(7), traced(recipe, 7)
    for phase in PHASES[1:]:
        assert told.ledger.peak(phase)[0] == itself.ledger.peak(phase)[0]
    assert reserved_peak(told.ledger) == reserved_peak(itself.ledger)
    assert told.work.flops_of() == pytest.approx(itself.work.flops_of())
    assert told.work.traffic == pytest.approx(itself.work.traffic)


@pytest.mark.parametrize(
    ("sections", "phase"),
    [
        ({"data": {"batch_size": 8}}, "backward"),
        ({"data": {"image_size": 56}}, "evaluation"),
        ({"lora": {**LORA, "r": 64}}, "step"),
        ({"model": {"dtype": "float32"}}, "saving"),
    ],
    ids=["batch", "image size", "rank", "dtype"],
)
def test_what_takes_more_is_seen_to_take_more(sections, phase):
    assert peaks(tiny_recipe(**{"lora": LORA, **sections}))[phase] > lora_peaks()[phase]


@pytest.mark.parametrize(
    ("sections", "phase"),
    [
        ({"training": CHECKPOINTED}, "backward"),
        ({"model": {"quantization": "nf4"}}, "saving"),
        ({"model": {"quantization": "int8"}}, "saving"),
        ({"memory": {"cache": ["vggt"]}}, "saving"),
        ({"training": {"optim": "adamw_bnb_8bit"}}, "saving"),
    ],
    ids=["checkpointing", "nf4", "int8", "cache", "8-bit states"],
)
def test_what_saves_memory_is_seen_to_save_it(sections, phase):
    assert peaks(tiny_recipe(**{"lora": LORA, **sections}))[phase] < lora_peaks()[phase]


def test_autocast_goes_by_cudas_list_for_a_while():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has(f"aten::{name}", "AutocastCUDA") for name in FLOAT32)
    assert not any(has(f"aten::{name}", "AutocastCPU") for name in FLOAT32)
    states = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(states, (4,)).dtype == torch.bfloat16
        with cuda_autocast():
            assert {f(states).dtype for f in (lambda x: F.layer_norm(x, (4,)), torch.exp, torch.Tensor.sum)} == {
                torch.float32
            }
            assert (states @ states.T).dtype == torch.bfloat16
        assert F.layer_norm(states, (4,)).dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["l1", "flow"])
def test_what_is_checkpointed_is_recomputed_by_the_rules_of_the_forward(head):
    sections = {"model": {"head": {**FLOW, "type": head}}, "lora": {"apply_to": ["vggt"]}}
    assert (
        peaks(tiny_recipe(**sections, training=CHECKPOINTED))["backward"] < peaks(tiny_recipe(**sections))["backward"]
    )


def test_offloaded_activations_live_on_the_host():
    on_device = tiny_recipe(lora=LORA, training=CHECKPOINTED)
    options = {**CHECKPOINTED, "activation_checkpointing_kwargs": {"offload": True}}
    offloaded = tiny_recipe(lora=LORA, training=options)
    here, there = traced(on_device).ledger, traced(offloaded).ledger
    assert here.host_peak() == 0
    assert there.host_peak() >= 2 * 4 * SHAPES.text_tokens * LLAMA["hidden_size"] * 2  # each layer's input, bf16
    assert there.peak("forward")[0] < here.peak("forward")[0]


def test_the_optimizer_in_backward_holds_one_gradient_at_a_time():
    at_the_end = {"model": BOTH_TRAIN, "training": {"max_grad_norm": 0.0}}
    in_backward = {**at_the_end, "memory": {"optimizer_in_backward": True}}
    gradients = kinds_of(tiny_recipe(**at_the_end))["gradients"]
    assert gradients > 0
    assert kinds_of(tiny_recipe(**in_backward))["gradients"] == 0
    saved = peaks(tiny_recipe(**at_the_end))["backward"] - peaks(tiny_recipe(**in_backward))["backward"]
    assert saved > 0.1 * gradients  # at the peak, activations are still there and gradients not yet


def test_bytes_of_weights_gradients_and_states_are_those_of_their_dtypes():
    recipe = tiny_recipe(model={**BOTH_TRAIN, "dtype": "float32"}, training={"bf16": False})
    kinds, parameters = kinds_of(recipe), traced(recipe).parameters["trained"]
    assert kinds["gradients"] == pytest.approx(4 * parameters, rel=0.1)  # small tensors fill blocks of 512 bytes
    assert kinds["optimizer"] == pytest.approx(8 * parameters, rel=0.25)


@pytest.mark.parametrize("extent", ["step", "run", "two steps"])
def test_the_allocator_reserves_no_less_than_tensors_hold(extent):
    ledger = traced(tiny_recipe(), extent=extent).ledger
    assert reserved_peak(ledger) >= ledger.peak()[0]


def test_gpus_that_are_here_are_left_alone(monkeypatch):
    def touch():
        raise AssertionError("a CUDA context was made")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", touch)
    recipe = tiny_recipe(training={"optim": "adamw_torch"})
    assert traced(recipe, extent="step").ledger.held("optimizer") == state_bytes(recipe, SHAPES)


def test_a_trace_ends_with_the_optimizers_states():
    recipe = tiny_recipe()
    run = traced(recipe, extent="step")
    assert run.ledger.held("optimizer") == state_bytes(recipe, SHAPES) >= 2 * run.trained_bytes


def test_frozen_vggt_costs_a_forward_and_no_backward():
    work = traced(tiny_recipe(lora=LORA)).work
    assert work.flops_of(("forward",))["vggt"] > 0
    assert "vggt" not in work.flops_of(("backward",))
    assert VGGT["depth"] == 1


FROZEN = {"freeze_vggt": True, "freeze_lang_encoder": True}
FULL_LANGUAGE = {"freeze_vggt": True, "freeze_lang_encoder": False}
IN_BACKWARD = {
    "training": {"max_grad_norm": 0.0, "optim": "paged_adamw_8bit"},
    "memory": {"optimizer_in_backward": True},
}
TRAINERS_EIGHT_BIT = {"training": {"optim": "adamw_bnb_8bit"}}
EIGHT_BIT = {**TRAINERS_EIGHT_BIT, "memory": {"embedding_state_bits": 8}}
EMBEDDINGS = 32_000 * 4_096 * (8 - 2) / GB
"""What Trainer adds to two bytes of state a parameter: of embeddings it keeps both moments in 32 bits."""


FUSION_AND_HEAD = 1.6
"""GB of 100 M float32 parameters, their gradients and moments, which the floors count for them."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "weights", "gradients", "states", "floor"),
    [
        # GB of both backbones; LLaMA 6.607 G parameters without lm_head, VGGT's aggregator 0.909 G, adapters 0.040 G
        ({"model": FROZEN}, 15.03, 0, 0, 16.6),
        ({"model": FROZEN, "lora": LORA}, 15.19, 0.160, 0.320, 17.3),
        ({"model": {**FROZEN, "quantization": "nf4"}, "lora": LORA}, 5.58, 0.160, 0.320, 7.7),
        ({"model": FULL_LANGUAGE}, 15.03, 13.21, 26.43, 56.3),
        ({"model": FULL_LANGUAGE, **EIGHT_BIT}, 15.03, 13.21, 13.42, 43.1),
        ({"model": FULL_LANGUAGE, **TRAINERS_EIGHT_BIT}, 15.03, 13.21, 13.42 + EMBEDDINGS, 43.1 + EMBEDDINGS),
        ({"model": BOTH_TRAIN}, 15.03, 15.03, 30.06, 61.7),
        ({"model": BOTH_TRAIN, **EIGHT_BIT}, 15.03, 15.03, 15.27, 46.7),
        ({"model": BOTH_TRAIN, **IN_BACKWARD}, 15.03, 0, 0.24, 16.6),  # the scales of 8-bit states are not paged
    ],
    ids=["frozen", "lora", "qlora", "full", "8 bits", "8 bits, Trainer's", "all", "all, 8 bits", "in backward, paged"],
)
def test_full_size_models_hold_what_arithmetic_says(sections, weights, gradients, states, floor):
    recipe = make_recipe({"data": {"batch_size": 1}, "training": {}, **sections})
    ledger = trace(recipe, Shapes()).ledger
    table = ledger.breakdown(ledger.peak("step")[1])
    held = [
        sum(table[c].get(kind, 0) for c in ("vggt", "language")) / GB for kind in ("weights", "gradients", "optimizer")
    ]
    assert held == pytest.approx([weights, gradients, states], rel=0.02, abs=0.1)
    assert sum(held) + FUSION_AND_HEAD == pytest.approx(floor, rel=0.02)


@pytest.mark.slow
def test_a_full_size_pair_takes_the_work_that_is_known_of_it():
    work = trace(make_recipe({"data": {"batch_size": 2}}), Shapes()).work
    assert work.flops_of(("forward",))["vggt"] / 2 == pytest.approx(6.47e12, rel=0.02)
