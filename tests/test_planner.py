import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_plan import SHAPES, tiny_recipe
from typer.testing import CliRunner

from hf_vla import planning
from hf_vla.assemble import build_config, build_on_meta
from hf_vla.cli import app, main
from hf_vla.memory.budget import MemoryBudgetError
from hf_vla.memory.gpus import GPUS, facts_of, find_gpu, write_calibration
from hf_vla.memory.ladder import Candidate, search
from hf_vla.memory.plan_table import render_candidates, render_plan
from hf_vla.memory.planner import make_plan, plan_recipe
from hf_vla.memory.sizes import format_size, parse_size
from hf_vla.memory.trace import trace
from hf_vla.memory.wishes import Wish, parse_train, recipe_of
from hf_vla.recipe import load_recipe

GPU = GPUS["RTX 6000 Ada"]
LORA = {"apply_to": ["lang_encoder"]}
MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="module")
def recipe():
    return tiny_recipe(lora=LORA)


@pytest.fixture(scope="module")
def traced(recipe):
    return trace(recipe, SHAPES)


def drawn(renderable) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "size"), [("28GiB", 28 * GIB), ("28 GB", 28 * 10**9), ("1.5gib", 3 * GIB // 2), ("30064771072", 28 * GIB)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "28 gallons", "-1GiB", "0", "28", "28 KiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="28GiB"):
        parse_size(text)


def test_sizes_are_written_as_people_read_them():
    assert (format_size(28 * GIB), format_size(9 * MIB)) == ("28.00 GiB", "9 MiB")


def test_a_plan_adds_up(recipe, traced):
    plan = make_plan(recipe, traced, 1 * GIB, 1, GPU, SHAPES)
    assert sum(sum(kinds.values()) for kinds in plan.components.values()) == plan.tensor_peak
    assert plan.total == plan.tensor_peak + sum(line.bytes for line in plan.lines)
    assert plan.tensor_peak == max(plan.phases.values()) == plan.phases[plan.peak_phase]
    assert plan.fits
    assert plan.headroom == GIB - plan.total
    assert json.loads(json.dumps(plan.to_dict()))["total"] == plan.total


def test_a_plan_that_does_not_fit_says_what_is_missing(recipe, traced):
    plan = make_plan(recipe, traced, 100 * MIB, 1, GPU, SHAPES)
    assert not plan.fits
    assert "✗ doesn't fit 100 MiB" in drawn(render_plan(plan))
    assert format_size(-plan.headroom) in drawn(render_plan(plan))


def test_a_plan_names_the_source_of_whatever_is_not_a_tensor(recipe, traced):
    plan = make_plan(recipe, traced, None, 2, GPU, SHAPES)
    assert {line.name for line in plan.lines} == {"fragmentation", "cuBLAS workspaces", "CUDA context", "NCCL"}
    text = drawn(render_plan(plan))
    assert all(line.source[:30] in text for line in plan.lines)
    assert plan.fits is None
    assert "No budget" in text


def test_sharding_divides_what_is_held_for_good(recipe, traced):
    sharded = tiny_recipe(lora=LORA, training={"fsdp": "full_shard"})
    alone, one_of_eight = (make_plan(sharded, traced, None, gpus, GPU, SHAPES) for gpus in (1, 8))
    weights = [sum(k.get("weights", 0) for k in plan.components.values()) for plan in (alone, one_of_eight)]
    assert weights[1] < weights[0] / 4  # blocks of 512 bytes keep small tensors from dividing evenly
    assert any(line.name == "gathered layers" for line in one_of_eight.lines)
    assert any("not traced" in note for note in one_of_eight.notes)


def test_sharding_counts_the_float32_copies_of_what_trains_in_16_bits():
    """accelerate makes them under FSDP2: of the weight, its gradient and both moments, 2 bytes more each."""
    full = {"freeze_lang_encoder": False, "dtype": "bfloat16"}
    made = tiny_recipe(model=full, lora={"apply_to": []}, training={"fsdp": True, "bf16": True})
    model = build_on_meta(made, build_config(made, SHAPES.num_views, SHAPES.state_dim, SHAPES.action_dim))
    halves = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16)
    lines = make_plan(made, trace(made, SHAPES), None, 8, GPU, SHAPES).lines
    assert halves > 0
    assert [line.bytes for line in lines if line.name == "float32 masters"] == [4 * 2 * halves // 8]


def test_assumed_shapes_are_said(recipe, traced):
    plan = make_plan(recipe, traced, None, 1, GPU, replace(SHAPES, assumed=("text_tokens",)))
    assert any("text_tokens 12" in note for note in plan.notes)


def test_an_empty_budget_is_a_mistake_and_not_the_recipes(recipe):
    with pytest.raises(ValueError, match="isn't a size"):
        plan_recipe(recipe, "", shapes=SHAPES)


def test_the_budget_is_the_recipes_unless_another_is_given(recipe):
    limited = replace(recipe, memory=replace(recipe.memory, budget="2GiB"))
    assert plan_recipe(limited, gpu="L40S", shapes=SHAPES).budget == 2 * GIB
    with pytest.raises(ValueError, match="isn't a size"):
        plan_recipe(recipe, budget="a lot", shapes=SHAPES)


def test_gpus_are_found_by_the_drivers_names():
    assert find_gpu("NVIDIA RTX 6000 Ada Generation").name == "RTX 6000 Ada"
    assert find_gpu("NVIDIA H100 80GB HBM3").name == "H100-80GB"
    assert find_gpu("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    with pytest.raises(ValueError, match="known are"):
        find_gpu("Voodoo 2")


def test_a_gpu_that_is_here_and_not_listed_is_planned_for_by_another_and_the_plan_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = facts_of("NVIDIA Voodoo 2")
    assert facts.name == "NVIDIA Voodoo 2"
    assert facts.context_bytes == find_gpu().context_bytes
    assert "nothing is known about a NVIDIA Voodoo 2" in facts.source
    write_calibration(replace(facts, context_bytes=321 * MIB, source="measured"))
    assert (facts_of("NVIDIA Voodoo 2").context_bytes, facts_of("NVIDIA Voodoo 2").source) == (321 * MIB, "measured")


def test_measured_constants_replace_stated_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_calibration(replace(GPU, context_bytes=321 * MIB, source="measured"))
    assert (find_gpu(GPU.name).context_bytes, find_gpu(GPU.name).source) == (321 * MIB, "measured")
    assert find_gpu("L40S").context_bytes == GPUS["L40S"].context_bytes


def test_what_to_train_is_read_in_words():
    assert parse_train("language=qlora, vggt=frozen") == {"language": "qlora", "vggt": "frozen"}
    for wrong in ("language=lots", "wheels=full", "vggt"):
        with pytest.raises(ValueError, match="language=lora"):
            parse_train(wrong)


def test_a_wish_becomes_a_recipe(recipe):
    made = recipe_of(Wish(language="qlora", vggt="full"), recipe)
    assert made.model.quantization == "nf4"
    assert made.model.freeze_lang_encoder
    assert not made.model.freeze_vggt
    assert made.lora.apply_to == ["lang_encoder"]


@pytest.mark.slow
def test_the_search_finds_what_fits_fastest_first(recipe):
    found = search(Wish(effective_batch=16), GIB, recipe, shapes=SHAPES, workers=1)
    speeds = [candidate.plan.samples_per_second for candidate in found]
    assert speeds[1:] == sorted(speeds[1:], reverse=True)
    assert all(candidate.plan.fits and candidate.plan.effective_batch == 16 for candidate in found)
    assert not any(candidate.changes for candidate in found)
    best = found[0]
    again = plan_recipe(best.recipe, GIB, shapes=SHAPES)
    assert again.total == best.plan.total
    assert "samples/s" in drawn(render_candidates(found))


@pytest.mark.slow
def test_vggt_ahead_of_small_micro_batches_is_proposed_where_it_is_faster(recipe):
    small = replace(recipe, data=replace(recipe.data, batch_size=2))
    budget = plan_recipe(small, shapes=SHAPES).total
    best, second, *_ = search(Wish(effective_batch=8), budget, recipe, shapes=SHAPES, workers=1)
    assert best.rungs[-1] == "VGGT ahead, 8 pairs at once"
    assert (best.recipe.memory.encode_ahead, second.recipe.memory.encode_ahead) == (8, 0)
    assert best.plan.total <= budget
    assert best.plan.total == plan_recipe(best.recipe, budget, shapes=SHAPES).total


@pytest.mark.slow
def test_an_impossible_budget_names_the_smallest_that_works(recipe):
    with pytest.raises(MemoryBudgetError, match=r"smallest budget that works is (\d+\.\d+ GiB)") as error:
        search(Wish(effective_batch=8), 100 * MIB, recipe, shapes=SHAPES, workers=1)
    assert "--allow quantize" in str(error.value)
    smallest = error.value.recipe
    assert f"works is {smallest.memory.budget} a GPU" in str(error.value)
    plan = plan_recipe(smallest, shapes=SHAPES)
    assert plan.effective_batch == 8
    assert 0 <= plan.headroom < 0.01 * GIB


def test_the_recipe_of_the_smallest_budget_is_written(recipe, tmp_path, monkeypatch):
    def find_nothing(*args, **kwargs):
        raise MemoryBudgetError("Nothing fits.", recipe)

    monkeypatch.setattr(planning, "search", find_nothing)
    output = tmp_path / "smallest.json"
    with pytest.raises(MemoryBudgetError, match=r"written to .*smallest\.json"):
        planning.show_search("language=lora", "1GiB", 1, None, None, 64, [], output)
    assert load_recipe(output) == recipe


def test_a_search_that_finds_nothing_exits_as_what_does_not_fit(recipe, tmp_path, monkeypatch, capsys):
    def find_nothing(*args, **kwargs):
        raise MemoryBudgetError("Nothing fits.", recipe)

    monkeypatch.setattr(planning, "search", find_nothing)
    words = ["--train", "language=lora", "--budget", "1GiB", "--output", str(tmp_path / "smallest.json")]
    monkeypatch.setattr(sys, "argv", ["hf-vla", "plan", *words])
    with pytest.raises(SystemExit, match="3"):
        main()
    assert capsys.readouterr().err.startswith("Error: Nothing fits.")


def test_the_fastest_is_written_with_the_budget_and_the_plan_of_its_own(recipe, traced, tmp_path, monkeypatch):
    plan = make_plan(recipe, traced, 28 * GIB, 1, find_gpu("RTX 6000 Ada"), SHAPES)
    asked = []

    def find(wish, budget, base, gpu):
        asked.append((budget, base))
        return [Candidate(base, plan, (), ())]

    monkeypatch.setattr(planning, "search", find)
    base = replace(recipe, about=replace(recipe.about, purpose="mine", predicted_peak_bytes=1, measured_peak_bytes=2))
    output = tmp_path / "found.json"
    planning.show_search("language=lora", "28GiB", 1, None, None, 64, [], output, base=base)
    assert asked == [(28 * GIB, base)]
    written = load_recipe(output)
    assert written.memory.budget == "28GiB" and written.data == base.data
    about = written.about
    assert (about.purpose, about.predicted_peak_bytes, about.measured_peak_bytes) == ("mine", plan.total, None)


def test_what_does_not_fit_is_told_the_search_that_says_what_would(tmp_path):
    tiny_recipe(lora={"apply_to": ["lang_encoder"]}).save(tmp_path / "tiny.json")
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "tiny.json"), "--budget", "100MiB"])
    words = f"plan {tmp_path / 'tiny.json'} --budget 0.10GiB --train language=lora,vggt=frozen --effective-batch 4"
    assert told.exit_code == 3 and words in told.stdout


@pytest.mark.parametrize(
    "words",
    [["recipe.json", "--image-size", "392"], ["--scenarios", "--cached"], ["--scenarios", "--set", "a.b=1"], []],
)
def test_options_that_would_go_unheard_are_refused(words):
    assert CliRunner().invoke(app, ["plan", *words]).exit_code == 2


def test_an_effective_batch_divides_over_the_gpus(recipe):
    with pytest.raises(ValueError, match="multiple of 3"):
        search(Wish(effective_batch=64, gpus=3), GIB, recipe, shapes=SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["safe", "lora", "lora_flow", "lora_discrete", "qlora", "balanced", "max", "full_language", "end_to_end"]
)
def test_the_recipes_fit_their_budgets(name, request):
    made = load_recipe(request.config.rootpath / f"recipes/{name}.json")
    plan = plan_recipe(made, gpu=GPU.name)
    assert plan.fits, drawn(render_plan(plan))
    if name == "lora":
        assert plan.batch_size >= 8
        assert parse_size("28GiB") == plan.budget


def test_recipes_quote_the_peaks_that_were_planned(request):
    root = request.config.rootpath
    planned = json.loads((root / "benchmarks/results/plans.json").read_text())["plans"]
    totals = {row["recipe"]: row["total"] for row in planned}
    quoted = {str(p.relative_to(root)): json.loads(p.read_text())["about"] for p in (root / "recipes").glob("*.json")}
    assert {name: about["predicted_peak_bytes"] for name, about in quoted.items()} == {
        name: totals[name] for name in quoted
    }
