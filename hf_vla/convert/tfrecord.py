"""TFRecord files and the `tf.train.Example` messages in them, read without tensorflow.

A record is its length (8 bytes), the length's checksum (4), the message, and the message's checksum (4); a message is in
Protocol Buffers' wire format: each field a tag (number and kind) and a value.

Source: tensorflow/core/lib/io/record_writer.h and tensorflow/core/example/example.proto.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_CASTAGNOLI = 0x82F63B78
"""The polynomial of CRC-32C, bits reversed."""
_MASK_DELTA = 0xA282EAD8
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5

Value = list[bytes] | np.ndarray
"""What a feature holds: byte strings, float32 or int64 numbers."""


def read_records(path: Path) -> Iterator[bytes]:
    """Give the messages of a TFRecord file in their order, each checked against its checksum.

    Raises:
        ValueError: names the file and the record that is cut short or damaged.
    """
    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else None
            if length is None or _masked_crc(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise _damaged(path, number, "its length can't be read")
            body = file.read(length + 4)
            if len(body) < length + 4:
                raise _damaged(path, number, f"it has {len(body)} of {length + 4} bytes: the file is cut short")
            if _masked_crc(body[:length]) != struct.unpack("<I", body[length:])[0]:
                raise _damaged(path, number, "its checksum is another")
            yield body[:length]
            number += 1


def parse_example(message: bytes) -> dict[str, Value]:
    """Read the features of a `tf.train.Example`, by name.

    Raises:
        ValueError: for bytes that aren't such a message.
    """
    try:
        features = [field for number, field in _fields(memoryview(message)) if number == 1]
        entries = [entry for part in features for number, entry in _fields(part) if number == 1]
        return dict(_parse_entry(entry) for entry in entries)
    except (IndexError, struct.error, TypeError) as error:
        raise ValueError(f"not a tf.train.Example ({error})") from None


def _parse_entry(entry: memoryview) -> tuple[str, Value]:
    fields = dict(_fields(entry))
    kinds = list(_fields(fields.get(2, memoryview(b""))))
    name = bytes(fields[1]).decode()
    return name, _parse_list(*kinds[0]) if kinds else np.zeros(0, np.float32)


def _parse_list(kind: int, content: memoryview) -> Value:
    values = [value for _, value in _fields(content)]
    if kind == 1:
        return [bytes(value) for value in values]
    if kind == 2:  # packed, or one by one; both are little-endian bytes
        return np.frombuffer(b"".join(values), "<f4")
    numbers = [n for value in values for n in (_varints(value) if isinstance(value, memoryview) else [value])]
    return np.array(numbers, np.uint64).astype(np.int64)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Give number and value of each field of a message, values of known size as bytes."""
    place, end = 0, len(message)
    while place < end:
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
        else:
            size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
            if kind == _SIZED:
                size, place = _varint(message, place)
            if size is None or place + size > end:
                raise IndexError(f"field {tag >> 3} of kind {kind} doesn't fit")
            value, place = message[place : place + size], place + size
        yield tag >> 3, value


def _varints(packed: memoryview) -> list[int]:
    numbers, place = [], 0
    while place < len(packed):
        number, place = _varint(packed, place)
        numbers.append(number)
    return numbers


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place


# CRC-32C over blocks of equal length side by side: a Python loop over every byte would take a second a megabyte ---------


def crc32c(data: bytes) -> int:
    """Compute the CRC-32C checksum."""
    values = np.frombuffer(data, np.uint8)
    side = int(len(values) ** 0.5)
    blocks = 1 << max(0, side.bit_length() - 1)
    length = len(values) // blocks
    head, rest = values[: blocks * length].reshape(blocks, length), values[blocks * length :]
    state = np.zeros(blocks, np.uint32)
    state[0] = 0xFFFFFFFF
    for column in head.T:
        state = _TABLE[(state ^ column) & 0xFF] ^ (state >> np.uint32(8))
    shift = _matrix_power(_ZERO_BYTE, length)
    while len(state) > 1:  # two neighbours at a time: the left one moves on by the length of the right one
        state = _apply(shift, state[0::2]) ^ state[1::2]
        shift = _apply(shift, shift)
    crc = int(state[0])
    for byte in rest.tolist():
        crc = int(_TABLE[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _make_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_CASTAGNOLI), table >> 1)
    return table


def _apply(matrix: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Multiply states by a (32,) matrix over GF(2), given as the image of each bit."""
    result = np.zeros_like(states)
    for bit in range(32):
        result ^= np.where((states >> np.uint32(bit)) & 1, matrix[bit], np.uint32(0))
    return result


def _matrix_power(matrix: np.ndarray, exponent: int) -> np.ndarray:
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    while exponent:
        if exponent & 1:
            result = _apply(matrix, result)
        matrix, exponent = _apply(matrix, matrix), exponent >> 1
    return result


def _zero_byte() -> np.ndarray:
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return _TABLE[bits & 0xFF] ^ (bits >> np.uint32(8))


_TABLE = _make_table()
_ZERO_BYTE = _zero_byte()
"""What reading one zero byte does to each bit of the state."""


def _damaged(path: Path, number: int, what: str) -> ValueError:
    return ValueError(f"{path}: record {number} is damaged, {what}. Fetch the file again.")
