"""A trained policy that acts: raw observation in, physical actions out.

Letters: T chunk length, A action dims, S state dims, H W pixels.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vla.checkpoint import load_checkpoint
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.model.processing_vla import VLAProcessor
from hf_vla.sample import IMAGES, STATE, TASK, Sample


class Policy:
    """A policy that predicts a chunk of actions, carries out its first ones, and looks again.

    Args:
        model: the trained model.
        processor: its processor.
        n_action_steps: actions of a chunk that are carried out before the next look; None carries out all T.
        seed: of the generator that a sampling head draws from.
    """

    def __init__(
        self,
        model: VLAForActionPrediction,
        processor: VLAProcessor,
        n_action_steps: int | None = None,
        seed: int = 0,
    ):
        self.model = model.eval()
        self.processor = processor
        self.n_action_steps = n_action_steps or model.config.chunk_size
        if not 1 <= self.n_action_steps <= model.config.chunk_size:
            raise ValueError(
                f"n_action_steps is {n_action_steps}; the policy predicts {model.config.chunk_size} actions at once."
            )
        self.seed = seed
        self.reset()

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, n_action_steps: int | None = None, device: str = "cpu"
    ) -> "Policy":
        """Open a checkpoint directory of a run.

        Args:
            directory: `model/` of a run, or any of its `checkpoint-N/`.
            n_action_steps: actions carried out of each chunk; None takes the recipe's.
            device: where the model runs.
        """
        model, processor, recipe = load_checkpoint(directory)
        steps = n_action_steps or min(recipe.evaluation.n_action_steps, recipe.model.chunk_size)
        return cls(model.to(device), processor, steps)

    def reset(self) -> None:
        """Forget the actions still to be carried out; to be called before each episode."""
        self._queue: deque[np.ndarray] = deque()
        self._generator = torch.Generator(self.model.device).manual_seed(self.seed)

    @property
    def needs_observation(self) -> bool:
        """Whether the next `select_action` looks at its observation."""
        return not self._queue

    def select_action(self, observation: Mapping[str, Any] | None = None) -> np.ndarray:
        """Give the next action.

        Args:
            observation: `observation.images.<camera>` (H, W, 3) uint8 for each view, `observation.state` (S,) and `task`;
                read only when `needs_observation`.

        Returns:
            (A,) float32, in the dataset's physical units.
        """
        if self.needs_observation:
            if observation is None:
                raise ValueError("The policy has carried out its last chunk and needs an observation.")
            self._queue.extend(self.predict_action_chunk(observation)[: self.n_action_steps])
        return self._queue.popleft()

    def predict_action_chunk(self, observation: Mapping[str, Any]) -> np.ndarray:
        """Predict the next T actions of one observation, (T, A) float32 in physical units."""
        missing = {STATE, TASK, *map(_camera_key, self.processor.views)} - set(observation)
        if missing:
            raise ValueError(f"The observation lacks {sorted(missing)}; it holds {sorted(observation)}.")
        images = [observation[_camera_key(view)] for view in self.processor.views]
        state = np.asarray(observation[STATE], np.float32)
        return self._predict([images], [observation[TASK]], state[None])[0]

    def predict_samples(self, samples: list[Sample]) -> np.ndarray:
        """Predict the chunk of each sample at once, (B, T, A) float32 in physical units."""
        state = np.stack([sample.state for sample in samples])
        return self._predict([sample.images for sample in samples], [sample.task for sample in samples], state)

    @torch.inference_mode()
    def _predict(self, images: list[list[np.ndarray]], tasks: list[str], state: np.ndarray) -> np.ndarray:
        batch = self.processor(images=images, task=tasks, state=state)
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        actions = self.model.predict_action(**batch, generator=self._generator)
        return self.processor.unnormalize_actions(actions).float().cpu().numpy()


def _camera_key(view: str) -> str:
    return f"{IMAGES}.{view}"
