"""HDF5 recordings: robomimic's and LIBERO's files of many demonstrations, ALOHA's files of one.

The only file that imports h5py.

robomimic and LIBERO: `/data/demo_<i>/{actions, obs/<name>}`, the instruction, where there is one, in the attribute
`problem_info` of `/data`. ALOHA: `/action`, `/observations/{qpos, images/<camera>}`, pictures raw, or as JPEG files padded
with zeros to one length.

Source: robomimic docs (dataset structure), LIBERO and ALOHA (act/record_sim_episodes.py). Letters: N steps of an episode.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from hf_vla.convert.episode import Column, RawEpisode, Shard

INSTRUCTION = "language_instruction"
"""Path under which the instruction of a LIBERO file is found."""
FILE_NAME = "file_name"
"""Path under which the file's name is found, in words: LIBERO and others name the task there."""


class HDF5Source:
    """A folder of HDF5 files, or one of them.

    Args:
        path: folder or file.

    Raises:
        FileNotFoundError: where no HDF5 file is there.
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    def shards(self) -> list[Shard]:
        """List the files, numbers in their names counted as numbers."""
        found = [self.path] if self.path.is_file() else [*self.path.rglob("*.hdf5"), *self.path.rglob("*.h5")]
        if not found:
            raise FileNotFoundError(f"{self.path}: no .hdf5 or .h5 file is there.")
        return [Shard(file) for file in sorted(found, key=lambda file: _natural(str(file)))]

    def episodes(self, shard: Shard) -> Iterator[RawEpisode]:
        """Read the episodes of one file.

        Raises:
            ValueError: names the file that can't be read, or has neither layout.
        """
        try:
            with h5py.File(shard.file, "r") as file:
                if "data" in file:
                    demos = sorted(file["data"], key=_natural)
                    texts = _texts(shard.file, file["data"])
                    yield from (_read_group(file["data"][name], name, texts) for name in demos)
                elif "action" in file or "actions" in file:
                    yield _read_group(file, shard.file.stem, _texts(shard.file, file))
                else:
                    raise ValueError(
                        f"{shard.file}: neither /data/demo_<i> (robomimic, LIBERO) nor /action (ALOHA) is in it; it has "
                        f"{', '.join(file)}."
                    )
        except OSError as error:
            raise ValueError(f"{shard.file}: can't be read as HDF5 ({error}). Fetch or record it again.") from None


def _read_group(group: h5py.Group, name: str, texts: dict[str, str]) -> RawEpisode:
    paths: list[str] = []
    group.visititems(lambda path, item: paths.append(path) if isinstance(item, h5py.Dataset) and item.shape else None)
    return RawEpisode(name, tuple(paths), partial(_column, group), texts)


def _column(group: h5py.Group, path: str) -> Column:
    values = group[path]
    if "image" in path and values.ndim != 4:  # encoded pictures: rows of bytes, padded or of their own lengths
        return [_unpad(np.asarray(row, np.uint8)) for row in values]
    column = values[()]
    return column[:, None] if column.ndim == 1 else column


def _unpad(row: np.ndarray) -> bytes:
    """Cut a JPEG at its end marker's place: the zeros after it only make rows equally long."""
    used = np.flatnonzero(row)
    return row[: used[-1] + 1].tobytes() if len(used) else b""


def _texts(file: Path, group: h5py.Group) -> dict[str, str]:
    texts = {FILE_NAME: re.sub(r"_demo$", "", file.stem).replace("_", " ")}
    for holder in ("problem_info", INSTRUCTION):
        text = group.attrs.get(holder)
        if text is not None:
            text = text.decode() if isinstance(text, bytes) else str(text)
            texts[INSTRUCTION] = _instruction(text)
    return texts


def _instruction(text: str) -> str:
    """Read LIBERO's `problem_info`, JSON that holds the instruction, some of it as a list of words; or a plain text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    words = found.get(INSTRUCTION, "") if isinstance(found, dict) else found
    return ("".join(words) if isinstance(words, list) else str(words)).strip().strip('"')


def _natural(name: str) -> list[tuple[int, str]]:
    """Order `demo_10` after `demo_9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
