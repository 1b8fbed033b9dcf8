"""Sizes of memory, as people write and read them."""

import re

UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
GIB = 2**30


def parse_size(text: str) -> int:
    """Read a size such as "28GiB", "28 GB" or "30064771072" as bytes; 1 GiB is 2**30 bytes, 1 GB is 10**9.

    Raises:
        ValueError: for what isn't a size, or isn't above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match and UNITS.get(match[2].upper())
    if not unit or float(match[1]) <= 0:
        raise ValueError(f"{text!r} isn't a size of memory; write it as 28GiB, 28GB, 28672MiB or in bytes.")
    return int(float(match[1]) * unit)


def format_size(size: int) -> str:
    """Write bytes in GiB as people read them, small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:.0f} MiB"
