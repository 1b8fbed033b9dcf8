"""Rotations from one way of writing them to another, through rotation matrices.

Letters: N rows. Angles in rad; `euler_xyz` is roll, pitch, yaw about fixed axes (R = Rz Ry Rx); `rotation_6d` holds the
first two columns of the matrix.
"""

import numpy as np

_SMALL = 1e-12


def convert_rotation(values: np.ndarray, given: str, wanted: str) -> np.ndarray:
    """Rewrite (N, d) rotations.

    Args:
        values: rotations as `given` writes them.
        given: one of `TO_MATRIX`.
        wanted: one of `FROM_MATRIX`.

    Raises:
        ValueError: for an unknown way, or numbers that don't fit it.
    """
    if given not in TO_MATRIX or wanted not in FROM_MATRIX:
        raise ValueError(
            f"rotation: from one of {', '.join(TO_MATRIX)} to one of {', '.join(FROM_MATRIX)}, not {given!r} to {wanted!r}"
        )
    size, to_matrix = TO_MATRIX[given]
    if values.shape[1] != size:
        raise ValueError(f"rotation: {given} has {size} numbers, here are {values.shape[1]}")
    return FROM_MATRIX[wanted](to_matrix(values.astype(np.float64))).astype(np.float32)


def _from_euler(angles: np.ndarray) -> np.ndarray:
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles).T, np.sin(angles).T
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _from_quaternion(xyzw: np.ndarray) -> np.ndarray:
    x, y, z, w = (xyzw / np.linalg.norm(xyzw, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _from_axis_angle(vectors: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(vectors, axis=1, keepdims=True)
    axis = vectors / np.maximum(angle, _SMALL)
    return _from_quaternion(np.concatenate([axis * np.sin(angle / 2), np.cos(angle / 2)], axis=1))


def _to_quaternion(matrices: np.ndarray) -> np.ndarray:
    """Take the quaternion's largest part from the matrix, the others from sums over it; x, y, z, w with w not negative."""
    m = matrices
    trace = np.trace(m, axis1=1, axis2=2)
    squares = np.stack([1 + 2 * m[:, i, i] - trace for i in range(3)] + [1 + trace], axis=1) / 4
    parts = np.empty((len(m), 4, 4))  # row k: the quaternion times four times its part k
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        parts[:, i, j] = parts[:, j, i] = m[:, i, j] + m[:, j, i]
        parts[:, i, 3] = parts[:, 3, i] = m[:, k, j] - m[:, j, k]
    for i in range(4):
        parts[:, i, i] = 4 * squares[:, i]
    rows = np.arange(len(m))
    largest = squares.argmax(1)
    quaternion = parts[rows, largest] / (4 * np.sqrt(squares[rows, largest]))[:, None]
    return quaternion * np.where(quaternion[:, 3:] < 0, -1, 1)


def _to_axis_angle(matrices: np.ndarray) -> np.ndarray:
    quaternion = _to_quaternion(matrices)
    sine = np.linalg.norm(quaternion[:, :3], axis=1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[:, 3:])
    return quaternion[:, :3] * np.where(sine > _SMALL, angle / np.maximum(sine, _SMALL), 2.0)


def _to_euler(matrices: np.ndarray) -> np.ndarray:
    m = matrices
    pitch = np.arctan2(-m[:, 2, 0], np.hypot(m[:, 0, 0], m[:, 1, 0]))
    locked = np.hypot(m[:, 0, 0], m[:, 1, 0]) < 1e-7  # roll and yaw turn alike: all is put into roll
    roll = np.where(locked, np.arctan2(-m[:, 1, 2], m[:, 1, 1]), np.arctan2(m[:, 2, 1], m[:, 2, 2]))
    yaw = np.where(locked, 0.0, np.arctan2(m[:, 1, 0], m[:, 0, 0]))
    return np.stack([roll, pitch, yaw], axis=1)


TO_MATRIX = {
    "euler_xyz": (3, _from_euler),
    "axis_angle": (3, _from_axis_angle),
    "quaternion_xyzw": (4, _from_quaternion),
    "quaternion_wxyz": (4, lambda wxyz: _from_quaternion(np.roll(wxyz, -1, axis=1))),
}
FROM_MATRIX = {
    "euler_xyz": _to_euler,
    "axis_angle": _to_axis_angle,
    "quaternion_xyzw": _to_quaternion,
    "rotation_6d": lambda m: np.concatenate([m[:, :, 0], m[:, :, 1]], axis=1),
}
