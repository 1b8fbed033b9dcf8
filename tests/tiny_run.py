"""A run small enough for tests: the tiny shapes, on the committed sample."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.recipe import Recipe, make_recipe

SAMPLE = Path(__file__).parent / "data/metaworld_sample"
SCALE, SHIFT = 50, 3
"""How the units of `with_other_units` lie to those of the sample: SCALE * x + SHIFT."""

TINY_VGGT = {"img_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 2, "encoder_depth": 1, "encoder_num_heads": 2}
TINY_LLAMA = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_recipe(**sections) -> Recipe:
    """A recipe of random-init tiny parts that trains for two steps; keyword sections are merged over it, key by key."""
    raw = {
        "model": {
            "vggt": TINY_VGGT,
            "lang_encoder": TINY_LLAMA,
            "freeze_vggt": False,
            "freeze_lang_encoder": False,
            "dtype": "float32",
            "fusion": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
            "head": {"hidden_size": 32, "num_layers": 1},
            "pool_grid": 2,
            "chunk_size": 4,
        },
        "data": {
            "dataset": str(SAMPLE),
            "batch_size": 4,
            "image_size": 28,
            "eval_fraction": 0.3,
            "num_workers": 0,
            "normalization": "mean_std",
        },
        "training": {
            "max_steps": 2,
            "bf16": False,
            "use_cpu": True,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "learning_rate": 1e-3,
            "report_to": [],
            "disable_tqdm": True,
        },
    }
    for section, values in sections.items():
        for key, value in values.items():
            old = raw.setdefault(section, {}).get(key)
            merge = isinstance(old, dict) and key not in ("vggt", "lang_encoder")
            raw[section][key] = {**old, **value} if merge else value
    return make_recipe(raw)


def with_other_units(root: Path) -> Path:
    """Write the sample as a robot with other units has it."""
    shutil.copytree(SAMPLE, root)
    (root / "meta/stats.json").unlink(missing_ok=True)
    for file in root.glob("data/**/*.parquet"):
        table = pq.read_table(file)
        for key in ("observation.state", "action"):
            scaled = np.stack(table[key].to_numpy()) * np.float32(SCALE) + np.float32(SHIFT)
            column = pa.array(list(scaled), table.schema.field(key).type)
            table = table.set_column(table.schema.get_field_index(key), table.schema.field(key), column)
        pq.write_table(table, file)
    return root


def released_weights(folder: Path) -> dict[str, str]:
    """Write tiny weights in the released files' formats, and give the recipe's keys for them."""
    script = Path(__file__).parent.parent / "data_scripts/make_tiny_checkpoint.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_vggt(folder / "vggt", width=64)
    module.write_llama(folder / "llama", width=64)
    return {"vggt": str(folder / "vggt"), "lang_encoder": str(folder / "llama")}
