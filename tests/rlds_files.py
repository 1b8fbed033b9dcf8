"""Tiny RLDS datasets, written from the formats' descriptions alone: TFRecord framing, Protocol Buffers, features.json.

State of step n of episode e: [e, n, 0, ..., 0.5]; the action is ten times smaller.
"""

import io
import json
import os
import signal
import struct
import time
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vla.convert.rlds import RLDSSource

SIZE = 16
CLASS = "tensorflow_datasets.core.features."


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def sized(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values) -> bytes:
    if isinstance(values, list):
        return sized(1, b"".join(sized(1, value) for value in values))
    values = np.asarray(values)
    if values.dtype.kind == "f":
        return sized(2, sized(1, values.astype("<f4").tobytes()))
    return sized(3, sized(1, b"".join(varint(int(value)) for value in values.reshape(-1))))


def example(features: dict) -> bytes:
    entries = [sized(1, sized(1, name.encode()) + sized(2, feature(values))) for name, values in features.items()]
    return sized(1, b"".join(entries))


def frame(message: bytes) -> bytes:
    head = struct.pack("<Q", len(message))
    return head + masked(head) + message + masked(message)


def tensor(*shape: int, dtype: str = "float32") -> dict:
    kind = {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype, "encoding": "none"}
    return {"pythonClassName": CLASS + "tensor_feature.Tensor", "tensor": kind}


def image() -> dict:
    shape = {"dimensions": [str(SIZE), str(SIZE), "3"]}
    return {"pythonClassName": CLASS + "image_feature.Image", "image": {"shape": shape, "encodingFormat": "jpeg"}}


TEXT = {"pythonClassName": CLASS + "text_feature.Text", "text": {}}


def group(**features) -> dict:
    return {"pythonClassName": CLASS + "features_dict.FeaturesDict", "featuresDict": {"features": features}}


def dataset(**features) -> dict:
    return {"pythonClassName": CLASS + "dataset_feature.Dataset", "sequence": {"feature": group(**features)}}


BRIDGE = {
    "observation": group(state=tensor(7), image_0=image(), image_1=image(), image_2=image(), image_3=image()),
    "action": tensor(7),
    "language_instruction": TEXT,
    "is_last": tensor(dtype="bool"),
}


def picture(*rgb: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), rgb).save(stream, "JPEG")
    return stream.getvalue()


def noise(seed: int) -> bytes:
    stream = io.BytesIO()
    drawn = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(stream, "JPEG")
    return stream.getvalue()


def bridge_episode(index: int, length: int, text: str = "put it there", noisy: bool = False) -> dict:
    state = np.zeros((length, 7), np.float32)
    state[:, 0], state[:, 1], state[:, 6] = index, np.arange(length), 0.5
    observation = {"steps/observation/state": state.reshape(-1)}
    for camera in range(4):
        pictures = [picture(10 * index, 20 * step % 256, 60 * camera) for step in range(length)]
        pictures = [noise(step) for step in range(length)] if noisy else pictures
        observation[f"steps/observation/image_{camera}"] = pictures
    return {
        **observation,
        "steps/action": (state / 10).reshape(-1),
        "steps/language_instruction": [text.encode()] * length,
        "steps/is_last": np.zeros(length, np.int64),
        "episode_metadata/file_path": [f"/demo/{index}".encode()],
    }


def write(folder: Path, shards: list[list[dict]], steps: dict = BRIDGE, split: str = "train") -> Path:
    folder.mkdir(parents=True)
    features = group(steps=dataset(**steps), episode_metadata=group(file_path=TEXT))
    (folder / "features.json").write_text(json.dumps(features))
    lengths = [str(len(shard)) for shard in shards]
    info = {"name": "toy", "splits": [{"name": split, "shardLengths": lengths}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for number, shard in enumerate(shards):
        file = folder / f"toy-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
        file.write_bytes(b"".join(frame(example(episode)) for episode in shard))
    return folder


class Interrupted(RLDSSource):
    """Kills the whole conversion once, in the middle of its second file."""

    def episodes(self, shard):
        marker = self.folder / "kill"
        for episode in super().episodes(shard):
            yield episode
            if "00001-of" in shard.file.name and marker.exists():
                while not (next(marker.parent.parent.glob(".out.parts"), marker) / "part-000000.json").exists():
                    time.sleep(0.01)
                marker.rename(marker.with_suffix(".done"))
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
