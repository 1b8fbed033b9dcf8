"""Three ways to act without learning, which a policy has to beat on held-out windows before its error means anything.

Letters: n windows, T chunk length, A action dims, S state dims.
"""

import numpy as np

from hf_vla.data.windows import WindowDataset

_STD_FLOOR = 1e-3
"""Of a state's dimension, in its unit, so that the noise of a joint that never moves doesn't decide who is near."""

_ROWS_AT_ONCE = 256


def mean_action(train: WindowDataset, held_out: WindowDataset, indices: np.ndarray) -> np.ndarray:
    """Predict the mean training action at every step: (n, T, A)."""
    shape = (len(indices), held_out.chunk_size, train.actions.shape[1])
    return np.broadcast_to(train.actions.mean(0), shape)


def hold_still(train: WindowDataset, held_out: WindowDataset, indices: np.ndarray) -> np.ndarray:
    """Predict the command that keeps the robot where it is: zero or the current state, (n, T, A).

    Zero for a dimension that commands a change, the state for one that commands a position; see `commands_position`.
    """
    still = np.zeros((len(indices), train.actions.shape[1]), np.float32)
    position = commands_position(train)
    if position.any():
        still[:, position] = held_out.windows(indices).state[:, position]
    return np.repeat(still[:, None], held_out.chunk_size, axis=1)


def commands_position(train: WindowDataset) -> np.ndarray:
    """Tell which action dimensions command a position, (A,) bool.

    Datasets don't say. A dimension does where state and action have the same layout, and the training actions lie at least
    twice as near to the state as to zero; a change that happens to resemble the state doesn't come so near.
    """
    states, actions = train.states, train.actions
    if states.shape[1] != actions.shape[1]:
        return np.zeros(actions.shape[1], bool)
    return 2 * np.abs(actions - states).mean(0) < np.abs(actions).mean(0)


def nearest_state(train: WindowDataset, held_out: WindowDataset, indices: np.ndarray) -> np.ndarray:
    """Predict the chunk that followed the nearest training state under the same instruction: (n, T, A).

    Nearness is Euclidean over states divided by their training std. An instruction that training doesn't have is looked
    up in all.
    """
    std = np.maximum(train.states.std(0), _STD_FLOOR)
    windows, train_tasks = held_out.windows(indices), np.asarray(train.tasks)
    known, asked = train.states / std, windows.state / std
    nearest = np.zeros(len(indices), np.int64)
    for task in np.unique(windows.task):
        rows, own = np.flatnonzero(windows.task == task), np.flatnonzero(train_tasks == task)
        candidates = own if len(own) else np.arange(len(known))
        nearest[rows] = candidates[_nearest(asked[rows], known[candidates])]
    return train.windows(nearest).actions


def _nearest(asked: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return for each row of `asked` (n, S) the row of `known` (m, S) at the least Euclidean distance."""
    parts = [asked[i : i + _ROWS_AT_ONCE] for i in range(0, len(asked), _ROWS_AT_ONCE)]
    squares = (known**2).sum(1)  # |a - k|² less the |a|² that all k share
    return np.concatenate([(squares - 2 * part @ known.T).argmin(1) for part in parts])


BASELINES = {"mean_action": mean_action, "hold_still": hold_still, "nearest_state": nearest_state}
