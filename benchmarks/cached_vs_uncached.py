"""What does a cache change, save and cost? The losses stay, steps are faster, the build is repaid, the loader keeps ahead.

    python -m benchmarks.cached_vs_uncached

On a CPU, at sizes a seven-thousandth of the real ones in arithmetic, VGGT to LLaMA in about the real proportion, on the
committed sample. Cached and uncached steps take turns in one run, so ratios hold whatever else the machine does; absolute
times don't. Arithmetic is counted, so that a ratio of times can be set beside that of what was computed. Formats are
compared with rows as VGGT-1B gives them.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

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
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float8": 1e-1}
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
            results["losses"] = dict(zip(WAYS, processes.map(compare, WAYS), strict=True))
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


def make_case(way: str, sizes: dict[str, dict], folder: Path, stored: str = "bfloat16") -> Recipe:
    """Make a way's recipe on new weights, all that can be cached named in it."""
    own = copy.deepcopy(WAYS[way])
    model = {
        **write_weights(folder / "weights", sizes),
        "dtype": "float32",
        "pool_grid": 4,
        "head": {"hidden_size": 64},
    }
    recipe = make_recipe(
        {
            "model": {**model, **own["model"]},
            "lora": own.get("lora", {}),
            "data": {
                "dataset": str(SAMPLE),
                "batch_size": BATCH,
                "image_size": 84,
                "eval_fraction": 0.0,
                "num_workers": 0,
            },
            "memory": {"cache_dir": str(folder / f"cache_{stored}"), "cache_dtype": stored},
            "training": {
                "learning_rate": 1e-3,
                "bf16": False,
                "use_cpu": True,
                "save_strategy": "no",
                "logging_steps": 1,
                "report_to": [],
                "disable_tqdm": True,
            },
        }
    )
    return with_cache(recipe, cacheable(recipe))


def compare_losses(way: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train without a cache, and from one of each precision."""
    torch.set_num_threads(1)
    exact, rows, folder = None, {}, folder / way
    for stored, tolerance in TOLERANCE.items():
        recipe = make_case(way, SIZES, folder, stored)
        recipe.training["max_steps"] = steps
        exact = losses(with_cache(recipe, []), folder / "uncached") if exact is None else exact
        built = build_caches(recipe)
        from_cache = losses(recipe, folder / f"run_{stored}")
        largest = float(np.max(np.abs(from_cache / exact - 1)))
        rows[stored] = {
            "largest_relative_difference": largest,
            "mean_relative_difference": float(np.mean(np.abs(from_cache / exact - 1))),
            "tolerance": tolerance,
            "same": largest <= tolerance,
            "stored_error_rms": {
                path.name.split("-")[0]: read_manifest(path / MANIFEST)["relative_error"] for path in built
            },
        }
    return {"steps": steps, "first_loss": exact[0], "last_loss": exact[-1], "stored_as": rows}


def losses(recipe: Recipe, folder: Path) -> np.ndarray:
    """Train, and give the loss of each step."""
    trainer = build_trainer(recipe, folder)
    trainer.train()
    return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def compare_speed(way: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Build the caches, time steps in turns, and time the loader alone."""
    recipe = make_case(way, SIZES, folder / way)
    recipe.training["max_steps"] = ROUND
    begun = time.perf_counter()
    built = build_caches(recipe)
    build_seconds = time.perf_counter() - begun
    recipes = {"uncached": with_cache(recipe, []), "cached": recipe}
    trainers = {name: build_trainer(each, folder / way / name) for name, each in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            seconds[name] += step_seconds(trainer)
    step = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = read_manifest(next(p for p in built if p.name.startswith("vggt")) / MANIFEST)["rows"]
    saved = (step["uncached"] - step["cached"]) / BATCH
    flops = {name: step_flops(trainer) for name, trainer in trainers.items()}
    cold, warm = read_speed(trainers["cached"], built)
    return {
        "step_seconds": {name: round(value, 4) for name, value in step.items()},
        "speed_up": step["uncached"] / step["cached"],
        "gflop_a_sample": {name: round(count / BATCH / 1e9, 3) for name, count in flops.items()},
        "less_arithmetic": flops["uncached"] / flops["cached"],
        "parameters_loaded": {n: sum(p.numel() for p in t.bare_model().parameters()) for n, t in trainers.items()},
        "build_seconds": round(build_seconds, 2),
        "build_over_saved_in_one_epoch": build_seconds / pairs / saved,
        "step_samples_per_s": {name: round(BATCH / value, 2) for name, value in step.items()},
        "loader_samples_per_s": {"cold": round(cold, 1), "warm": round(warm, 1)},
        "loader_over_ten_times_uncached": cold / (10 * BATCH / step["uncached"]),
    }


class Clock(TrainerCallback):
    """Notes when each step ends; between two ends lies a whole step, its data and its logging."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        self.ends.append(time.perf_counter())


def step_seconds(trainer: VLATrainer) -> list[float]:
    """Train a round, and give what each step but the first took."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return np.diff(clock.ends).tolist()


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
