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
from hf_vla.sample import GOAL, IMAGES, STATE, TASK, ParsedView, Sample, parse_view, view_name


class Policy:
    """A policy that predicts a chunk of actions, carries out its first ones, and looks again.

    Args:
        model: the trained model.
        processor: its processor.
        n_action_steps: actions of a chunk that are carried out before the next look; None carries out all T.
        seed: of the generator that a sampling head draws from.
        dataset: of a policy of several, the one whose robot acts: observations are in its units, and so are actions.

    Raises:
        ValueError: for more steps than a chunk has, or a dataset that the policy wasn't trained on.
    """

    def __init__(
        self,
        model: VLAForActionPrediction,
        processor: VLAProcessor,
        n_action_steps: int | None = None,
        seed: int = 0,
        dataset: str | None = None,
    ):
        self.model = model.eval()
        self.processor, self.dataset = processor, dataset
        if dataset is not None:
            processor.stats_of(dataset)  # fails now, not at the first observation
        self.n_action_steps = n_action_steps or model.config.chunk_size
        if not 1 <= self.n_action_steps <= model.config.chunk_size:
            raise ValueError(
                f"n_action_steps is {n_action_steps}; the policy predicts {model.config.chunk_size} actions at once."
            )
        self.seed = seed
        self._views = [parse_view(name) for name in processor.views]
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        n_action_steps: int | None = None,
        device: str = "cpu",
        dataset: str | None = None,
    ) -> "Policy":
        """Open a checkpoint directory of a run.

        Args:
            directory: `model/` of a run, or any of its `checkpoint-N/`.
            n_action_steps: actions carried out of each chunk; None takes the recipe's.
            device: where the model runs.
            dataset: of a policy of several, the one whose robot acts; None takes the recipe's `evaluation.dataset`.
        """
        model, processor, recipe = load_checkpoint(directory)
        steps = n_action_steps or min(recipe.evaluation.n_action_steps, recipe.model.chunk_size)
        return cls(model.to(device), processor, steps, dataset=dataset or recipe.evaluation.dataset)

    def reset(self) -> None:
        """Forget the episode: actions still to be carried out, and pictures that views of the past look back at."""
        self._queue: deque[np.ndarray] = deque()
        self._pictures: dict[str, deque[np.ndarray]] = {
            camera: deque(maxlen=1 + max(-view.offset for view in self._views if view.camera == camera))
            for camera in {view.camera for view in self._views if view.offset != GOAL}
        }
        self._generator = torch.Generator(self.model.device).manual_seed(self.seed)

    @property
    def needs_observation(self) -> bool:
        """Whether the next `select_action` looks: when its chunk is used up, and always where a view shows the past."""
        return not self._queue or any(pictures.maxlen > 1 for pictures in self._pictures.values())

    def select_action(self, observation: Mapping[str, Any] | None = None) -> np.ndarray:
        """Give the next action.

        Args:
            observation: `observation.images.<camera>` (H, W, 3) uint8 for each camera (for a view of the goal
                `observation.images.<camera>@goal`), `observation.state` (S,) and `task`; read only when
                `needs_observation`.

        Returns:
            (A,) float32, in the dataset's physical units.
        """
        if self.needs_observation:
            if observation is None:
                raise ValueError("The policy needs an observation now: see its needs_observation.")
            self._look(observation)
        if not self._queue:
            self._queue.extend(self._predict_from_here(observation)[: self.n_action_steps])
        return self._queue.popleft()

    def predict_action_chunk(self, observation: Mapping[str, Any]) -> np.ndarray:
        """Predict the next T actions of one observation, (T, A) float32 in physical units."""
        self._look(observation)
        return self._predict_from_here(observation)

    def _look(self, observation: Mapping[str, Any]) -> None:
        """Keep what a view of this moment or a later one shows."""
        wanted = {STATE, TASK, *(_key(view) for view in self._views)}
        if not wanted <= set(observation):
            raise ValueError(
                f"The observation lacks {sorted(wanted - set(observation))}; it holds {sorted(observation)}."
            )
        for camera, pictures in self._pictures.items():
            pictures.append(observation[f"{IMAGES}.{camera}"])

    def _predict_from_here(self, observation: Mapping[str, Any]) -> np.ndarray:
        images = [self._picture(view, observation) for view in self._views]
        state = np.asarray(observation[STATE], np.float32)
        return self._predict([images], [observation[TASK]], state[None], self.dataset)[0]

    def _picture(self, view: ParsedView, observation: Mapping[str, Any]) -> np.ndarray:
        """Give a view's picture; before the episode began there was its first frame, as in training."""
        if view.offset == GOAL:
            return observation[_key(view)]
        pictures = self._pictures[view.camera]
        return pictures[max(0, len(pictures) - 1 + view.offset)]

    def predict_samples(self, samples: list[Sample]) -> np.ndarray:
        """Predict the chunk of each sample at once, (B, T, A) float32 in the physical units of its own dataset."""
        state = np.stack([sample.state for sample in samples])
        sources = [sample.source for sample in samples] if self.processor.datasets else None
        return self._predict(
            [sample.images for sample in samples], [sample.task for sample in samples], state, sources
        )

    @torch.inference_mode()
    def _predict(
        self,
        images: list[list[np.ndarray]],
        tasks: list[str],
        state: np.ndarray,
        dataset: str | list[str] | None = None,
    ) -> np.ndarray:
        batch = self.processor(images=images, task=tasks, state=state, dataset=dataset)
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        actions = self.model.predict_action(**batch, generator=self._generator)
        return self.processor.unnormalize_actions(actions, dataset, state).cpu().numpy()


def _key(view: ParsedView) -> str:
    """Name the picture that has to be observed for a view: a camera's, now, or its goal."""
    return f"{IMAGES}.{view_name(view.camera, GOAL) if view.offset == GOAL else view.camera}"
