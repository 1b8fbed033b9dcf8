"""What does a cache change, save and cost? The losses stay, steps are faster, the build is repaid, the loader keeps ahead.

    python -m benchmarks.cached_vs_uncached

On a CPU, at sizes a seven-thousandth of the real ones in arithmetic, VGGT to LLaMA in about the real proportion, on the
committed sample. Losses are compared for runs in float32 and in bfloat16. Stored as the run computes them (`auto`, the
default), features are the same numbers; stored as less, the losses of single steps drift apart, and two controls say why:
`rounded` runs VGGT in every step and rounds its tokens to bfloat16 there, `nudged` trains from pixels with weights that
begin one float32 rounding away.

Cached and uncached steps take turns in one run, so ratios hold whatever else the machine does; absolute times don't, and
processor times stand beside those of the wall. What the cache costs is all of the build; what it saves in an epoch is that
of the steps and of starting up, where VGGT isn't loaded. Arithmetic is counted, so that a ratio of times can be set beside
that of what was computed. Formats are compared with rows as VGGT-1B gives them.
"""

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, TrainerCallback

from benchmarks.feature_formats import forget, measure_formats
from benchmarks.result import RESULTS, write_result
from hf_vla.caching import build_caches, cacheable, with_cache
from hf_vla.data.collator import VLACollator
from hf_vla.data.feature_cache import MANIFEST, read_manifest
from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.modeling_vggt import VGGTModel
from hf_vla.prepare import build_trainer
from hf_vla.recipe import Recipe, make_recipe
from hf_vla.trainer import VLATrainer
from hf_vla.weights import byte_tokenizer, lang_encoder_config

SAMPLE = Path(__file__).parent.parent / "tests/data/metaworld_sample"
SIZES = {
    "vggt": {"img_size": 84, "embed_dim": 192, "depth": 4, "num_heads": 4, "encoder_depth": 4, "encoder_num_heads": 4},
    "lang_encoder": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 344,
        "num_attention_heads": 4,
        "vocab_size": 384,
    },
}
"""About 0.9 GFLOP for VGGT's pair and 0.3 for a LoRA step of LLaMA on 96 tokens; the real ones take 6500 and 2500."""
WAYS = {
    "lora": {"lora": {"apply_to": ["lang_encoder"]}, "model": {"fusion": {"type": "prefix", "hidden_size": 64}}},
    "both_frozen": {"model": {"fusion": {"type": "cross_attention", "hidden_size": 64, "num_heads": 2}}},
}
PRECISIONS = {
    "float32": {"model": {"dtype": "float32"}, "training": {"bf16": False}},
    "bfloat16": {"model": {"dtype": "bfloat16"}, "training": {"bf16": True}},
}
"""What a run computes in."""
STORED = {"float32": ("auto", "bfloat16", "float8"), "bfloat16": ("auto", "float8")}
"""What features are stored as, for each of them."""
TOLERANCE = {"auto": 1e-4, "bfloat16": 1e-2, "float8": 1e-1}
"""Largest difference of a loss, relative to it, that is called the same."""
STEPS = 100
ROUND, ROUNDS = 5, 6
"""Steps at a time of each of the two, and how often they take turns; the first step of each round isn't counted."""
BATCH = 4


def main() -> None:
    """Measure part after part, each written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="over which losses are compared")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timed steps")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time where losses are compared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = {"sizes": SIZES, "batch_size": BATCH}
        compare = functools.partial(compare_losses, steps=options.steps, folder=folder / "losses")
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as processes:
            cases = list(itertools.product(WAYS, PRECISIONS))
            found = dict(zip(cases, processes.map(compare, cases), strict=True))
        results["losses"] = {way: {name: found[way, name] for name in PRECISIONS} for way in WAYS}
        write_result("cached_vs_uncached", results, options.results)
        results["speed"] = {way: compare_speed(way, options.rounds, folder / "speed") for way in WAYS}
        write_result("cached_vs_uncached", results, options.results)
        results["formats"] = measure_formats(folder / "formats")
    print(f"Written: {write_result('cached_vs_uncached', results, options.results)}")


def write_weights(folder: Path, sizes: dict[str, dict]) -> dict[str, str]:
    """Write random weights of both backbones in the released files' formats, and give the recipe's keys for them."""
    torch.manual_seed(0)
    places = {name: folder / name for name in ("vggt", "lang_encoder")}
    keys = {name: str(place) for name, place in places.items()}
    if folder.exists():
        return keys
    for place in places.values():
        place.mkdir(parents=True)
    vggt = VGGTModel(VGGTConfig(**sizes["vggt"]))
    save_file(
        {f"aggregator.{n}": t.contiguous() for n, t in vggt.state_dict().items()}, places["vggt"] / "model.safetensors"
    )
    (places["vggt"] / "config.json").write_text(json.dumps(sizes["vggt"]))
    AutoModel.from_config(lang_encoder_config(sizes["lang_encoder"])).save_pretrained(places["lang_encoder"])
    byte_tokenizer().save_pretrained(places["lang_encoder"])
    return keys


def make_case(
    way: str,
    sizes: dict[str, dict],
    folder: Path,
    stored: str = "auto",
    precision: str = "float32",
    batch: int = BATCH,
) -> Recipe:
    """Make a way's recipe on new weights, all that can be cached named in it."""
    own, run = copy.deepcopy(WAYS[way]), PRECISIONS[precision]
    model = {**write_weights(folder / "weights", sizes), **run["model"], "pool_grid": 4, "head": {"hidden_size": 64}}
    recipe = make_recipe(
        {
            "model": {**model, **own["model"]},
            "lora": own.get("lora", {}),
            "data": {
                "dataset": str(SAMPLE),
                "batch_size": batch,
                "image_size": 84,
                "eval_fraction": 0.0,
                "num_workers": 0,
            },
            "memory": {"cache_dir": str(folder / f"cache_{precision}_{stored}"), "cache_dtype": stored},
            "training": {
                "learning_rate": 1e-3,
                **run["training"],
                "use_cpu": True,
                "save_strategy": "no",
                "logging_steps": 1,
                "report_to": [],
                "disable_tqdm": True,
            },
        }
    )
    return with_cache(recipe, cacheable(recipe))


def compare_losses(case: tuple[str, str], steps: int, folder: Path) -> dict[str, Any]:
    """Train without a cache, and from one of each kind; then the controls."""
    torch.set_num_threads(1)
    (way, precision), rows = case, {}
    folder = folder / way / precision
    make = functools.partial(make_case, way, SIZES, folder, precision=precision)
    exact = losses(with_cache(make(), []), steps, folder / "uncached")
    for stored in STORED[precision]:
        recipe = make(stored)
        built = build_caches(recipe)
        found = difference(losses(recipe, steps, folder / f"run_{stored}"), exact)
        errors = {path.name.split("-")[0]: read_manifest(path / MANIFEST)["relative_error"] for path in built}
        same = found["largest_relative_difference"] <= TOLERANCE[stored]
        rows[stored] = {**found, "tolerance": TOLERANCE[stored], "same": same, "stored_error_rms": errors}
    controls = {
        name: difference(losses(with_cache(make(), []), steps, folder / name, change), exact)
        for name, change in (CONTROLS.items() if precision == "float32" else ())
    }
    return {"steps": steps, "first_loss": exact[0], "last_loss": exact[-1], "stored_as": rows, "controls": controls}


def difference(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Say how far the losses of two runs lie apart."""
    apart = np.abs(found / exact - 1)
    names = ("largest", "mean", "last_ten_steps_mean")
    values = (np.max(apart), np.mean(apart), np.abs(found[-10:].mean() / exact[-10:].mean() - 1))
    return {f"{name}_relative_difference": float(value) for name, value in zip(names, values, strict=True)}


def losses(
    recipe: Recipe, steps: int, folder: Path, change: Callable[[VLATrainer], None] = lambda trainer: None
) -> np.ndarray:
    """Train, and give the loss of each step."""
    recipe.training["max_steps"] = steps
    trainer = build_trainer(recipe, folder)
    change(trainer)
    trainer.train()
    return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def round_tokens(trainer: VLATrainer) -> None:
    """Let the model round VGGT's tokens to bfloat16, each time anew."""
    model = trainer.bare_model().model
    encode = model.encode_views
    model.encode_views = lambda pixels: encode(pixels).bfloat16()


def nudge(trainer: VLATrainer) -> None:
    """Move each weight that trains by one rounding."""
    with torch.no_grad():
        for parameter in trainer.bare_model().parameters():
            if parameter.requires_grad:
                parameter.nextafter_(torch.full_like(parameter, torch.inf))


CONTROLS = {"rounded": round_tokens, "nudged": nudge}


def compare_speed(way: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Build the caches, time steps in turns, and time the loader alone."""
    recipe = make_case(way, SIZES, folder / way)
    recipe.training["max_steps"] = ROUND
    build, built = clocked(lambda: build_caches(recipe))
    recipes = {"uncached": with_cache(recipe, []), "cached": recipe}
    start, trainers = {}, {}
    for name, each in recipes.items():
        start[name], trainers[name] = clocked(functools.partial(build_trainer, each, folder / way / name))
    moments: dict[str, list[Moment]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            moments[name] += step_lengths(trainer)
    step = {name: Moment(*map(statistics.median, zip(*found, strict=True))) for name, found in moments.items()}
    pairs = read_manifest(next(p for p in built if p.name.startswith("vggt")) / MANIFEST)["rows"]
    flops = {name: step_flops(trainer) for name, trainer in trainers.items()}
    cold, warm = read_speed(trainers["cached"], built)
    return {
        "seconds_of": Moment._fields,
        "step_seconds": step,
        "speed_up": step["uncached"].wall / step["cached"].wall,
        "gflop_a_sample": {name: round(count / BATCH / 1e9, 3) for name, count in flops.items()},
        "less_arithmetic": flops["uncached"] / flops["cached"],
        "parameters_loaded": {n: sum(p.numel() for p in t.bare_model().parameters()) for n, t in trainers.items()},
        "pairs": pairs,
        "build_seconds": build,
        "start_seconds": start,
        **repaid(build, start, step, pairs),
        "step_samples_per_s": {name: round(BATCH / value.wall, 2) for name, value in step.items()},
        "loader_samples_per_s": {"cold": round(cold, 1), "warm": round(warm, 1)},
        "loader_over_ten_times_uncached": cold / (10 * BATCH / step["uncached"].wall),
    }


class Moment(NamedTuple):
    """Seconds by two clocks."""

    processor: float
    wall: float

    def since(self, earlier: "Moment") -> "Moment":
        """Give the time from an earlier moment to this."""
        return Moment(self.processor - earlier.processor, self.wall - earlier.wall)


def now() -> Moment:
    """Read both clocks."""
    return Moment(time.process_time(), time.perf_counter())


def clocked(work: Callable[[], Any]) -> tuple[Moment, Any]:
    """Do some work; give the time it took, and what it gave."""
    begun = now()
    done = work()
    return now().since(begun), done


def repaid(
    build: Moment, start: dict[str, Moment], step: dict[str, Moment], pairs: int
) -> dict[str, dict[str, float]]:
    """Set the build beside what an epoch of steps saves, and beside what it saves with its start."""
    ratios = {}
    for clock, seconds in build._asdict().items():
        begun, steps = ({name: getattr(m, clock) for name, m in each.items()} for each in (start, step))
        by_steps = (steps["uncached"] - steps["cached"]) * pairs / BATCH
        whole = by_steps + begun["uncached"] - begun["cached"]
        ratios[clock] = {"of_the_steps": seconds / by_steps, "of_a_whole_epoch": seconds / whole}
    return {"build_over_saved_in_one_epoch": ratios}


class Clock(TrainerCallback):
    """Notes when each step ends; between two ends lies a whole step, its data and its logging."""

    def __init__(self):
        self.ends: list[Moment] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        self.ends.append(now())


def step_lengths(trainer: VLATrainer) -> list[Moment]:
    """Train a round, and give what each step but the first took."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return lengths(clock.ends)


def lengths(ends: Iterable[Moment]) -> list[Moment]:
    """Give the time between the ends of steps."""
    return [later.since(earlier) for earlier, later in itertools.pairwise(ends)]


def step_flops(trainer: VLATrainer) -> int:
    """Count the arithmetic of one step, forward and backward."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    with FlopCounterMode(display=False) as counter:
        trainer.bare_model()(**batch).loss.backward()
    trainer.bare_model().zero_grad()
    return counter.get_total_flops()


def read_speed(trainer: VLATrainer, folders: list[Path]) -> tuple[float, float]:
    """Read every sample in random order through the collator alone, and give samples/s, cold and warm."""
    order = np.random.default_rng(0).permutation(len(trainer.train_dataset)).tolist()
    collate = VLACollator(trainer.processing_class)
    found = []
    for is_cold in (True, False):
        if is_cold:
            for path in (path for folder in folders for path in folder.glob("*.safetensors")):
                forget(path)
        begun = time.perf_counter()
        for start in range(0, len(order), BATCH):
            collate([trainer.train_dataset[i] for i in order[start : start + BATCH]])
        found.append(len(order) / (time.perf_counter() - begun))
    return found[0], found[1]


if __name__ == "__main__":
    main()
