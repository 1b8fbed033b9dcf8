"""What a file or a few words hold, as a short digest; a file is read again only when the system says that it was touched."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LENGTH = 32
"""Hexadecimal digits that are kept of SHA-256: 128 bits, beyond any accident."""

SETTLED = 2.0
"""Seconds since its last change from which on a file is taken to be at rest: clocks of file systems tick coarsely."""
PIECE = 2**20
"""Bytes that are read at a time."""


class FileDigests:
    """Digests of files, kept beside what tells that a file is still the one that was read: size, times, inode.

    Reading 18 GB of weights takes half a minute, and every training from a cache would have to. The time of a file's last
    change of any kind (ctime) is among them, which no program can set back.

    Args:
        store: file in which they are kept; needn't exist, and what can't be written there is read again next time.
    """

    def __init__(self, store: Path):
        self._store = store
        self._known = _read(store)

    def of(self, path: Path) -> str:
        """Give the digest of one file's content.

        Raises:
            FileNotFoundError: if it isn't there.
        """
        real = path.resolve()
        status = real.stat()
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.get(str(real))
        if known is None or known["mark"] != mark:
            known = {"mark": mark, "digest": _read_through(real)}
            if time.time() - status.st_ctime > SETTLED:
                self._known[str(real)] = known
        return known["digest"]

    def keep(self) -> None:
        """Write what was read, for the next process."""
        try:
            self._store.parent.mkdir(parents=True, exist_ok=True)
            aside = self._store.with_name(f"{self._store.name}.{os.getpid()}.tmp")
            aside.write_text(json.dumps(self._known))
            aside.replace(self._store)
        except OSError:  # a cache on a disk that can't be written to: all that is lost is time
            return


def digest_of(value: Any) -> str:
    """Give the digest of anything that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:LENGTH]


def digest_files(digests: FileDigests, root: Path, names: Iterable[str]) -> dict[str, str]:
    """Give the digest of each named file of a folder, by its name."""
    return {name: digests.of(root / name) for name in sorted(names)}


def _read_through(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()[:LENGTH]


def _read(store: Path) -> dict[str, Any]:
    try:
        return json.loads(store.read_text())
    except (OSError, ValueError):
        return {}
