"""Building a cache of text states: one shard that holds the states of every instruction, one behind the other.

Letters: L text tokens, D LLaMA width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hf_vla.data.feature_build import said_plainly, shard_file, write_manifest
from hf_vla.data.feature_cache import Key
from hf_vla.data.feature_store import write_shard


def build_texts(
    folder: Path, key: Key, prompts: dict[str, list[int]], encode: Callable[[list[int]], Tensor], stored: str
) -> None:
    """Encode every instruction and write the cache.

    Args:
        folder: of the cache.
        key: what its content is made of.
        prompts: each instruction's token ids.
        encode: token ids of one prompt to its states (L, D).
        stored: `float32`, `bfloat16` or `float8`.

    Raises:
        OSError: if the disk is full, saying what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states, texts, end = [], {}, 0
    for task, ids in prompts.items():
        states.append(encode(ids))
        texts[task] = [end, end + len(ids)]
        end += len(ids)
    with said_plainly(folder):
        shard = write_shard(folder / shard_file(0), torch.cat(states), stored)
        write_manifest(folder, key, [shard], {"stored": stored, "rows": end, "texts": texts})
