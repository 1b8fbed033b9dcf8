"""Sizes of memory, as people write and read them."""

import re

UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
GIB = 2**30
LEAST = 2**20
"""Bytes below which a number was meant in another unit: nobody budgets less than 1 MiB."""


def parse_size(text: str) -> int:
    """Read a size such as "28GiB", "28 GB" or "30064771072" as bytes; 1 GiB is 2**30 bytes, 1 GB is 10**9.

    Raises:
        ValueError: for what isn't a size, or is less than 1 MiB, as a number whose unit was forgotten.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match and UNITS.get(match[2].upper())
    if not unit or float(match[1]) <= 0:
        raise ValueError(f"{text!r} isn't a size of memory; write it as 28GiB, 28GB, 28672MiB or in bytes.")
    size = int(float(match[1]) * unit)
    if size < LEAST:
        raise ValueError(f"{text!r} is {size} bytes, too few for any use: was {match[1]}GiB meant?")
    return size


def format_size(size: int) -> str:
    """Write bytes in GiB as people read them, small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:.0f} MiB"
