"""Which files a backbone's weights lie in, without reading them: what has to be the same for its outputs to be."""

import json
from pathlib import Path

from .files import CONFIG, require_file
from .vggt import FILES

INDEX = ".index.json"
"""What a list of shards is called behind the name of the file that they make up."""
DECODER_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX))
"""Of a decoder, in the order in which transformers looks for them."""


def vggt_files(source: str) -> list[Path]:
    """List the files of VGGT's weights, downloaded if need be.

    Raises:
        FileNotFoundError: if the source isn't there; says how to get it.
    """
    path = Path(source).expanduser()
    return [path if path.is_file() else require_file(source, FILES, "VGGT weights")]


def decoder_files(source: str) -> list[Path]:
    """List the files of a decoder's weights and its config, downloaded if need be.

    Raises:
        FileNotFoundError: if the source isn't there, or lacks one of them; says how to get it.
    """
    first = require_file(source, DECODER_FILES, "weights of a language model")
    config = require_file(source, [CONFIG], "config of a language model")
    if not first.name.endswith(INDEX):
        return [config, first]
    shards = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    return [config, *(require_file(source, [shard], f"shard {shard}") for shard in shards)]
