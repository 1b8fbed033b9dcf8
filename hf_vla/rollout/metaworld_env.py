"""One Meta-World task as a policy meets it: pictures, what a robot knows of itself, the instruction; and an expert.

Meta-World and MuJoCo are imported here alone, and only when a simulator is made. MuJoCo reads the environment variable
MUJOCO_GL once, on import: `egl` draws on a GPU or in software, `osmesa` in software. Where it isn't set, the first of the
two that works is taken.
"""

import atexit
import difflib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_vla.rollout.graphics import graphics_problem
from hf_vla.rollout.loop import EnvStep
from hf_vla.rollout.metaworld_tasks import GOAL_DOTS, INSTRUCTIONS, MEASURED_JOINTS
from hf_vla.sample import IMAGES, STATE, TASK

CAMERAS = ("corner2", "gripperPOV")
STATE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_opening")
ACTION_NAMES = ("delta_x", "delta_y", "delta_z", "gripper_closing")
SIMULATOR_RATE = 80
"""Actions a second that Meta-World itself takes."""

_UPSIDE_DOWN = "corner2"
_HIDDEN, _SHOWN = 5, 0  # MuJoCo's groups of sites: numbers that mean only what a scene option shows


class MetaWorldEnv:
    """One Meta-World v3 task: starts anew from a seed, draws only when looked at, holds each action for a while.

    Args:
        task: Meta-World's name, such as `reach-v3`.
        image_size: side of the square pictures, in pixels.
        cameras: names of Meta-World's cameras; `corner2` is turned upright.
        action_repeat: simulator steps (1/80 s each) that one action is held for; `fps` is 80 / action_repeat.
        field_of_view: vertical angle in degrees by camera, where it isn't the camera's own (60 for `corner2`).
        instruction: what to tell the policy; None takes the published text, another task's shows whether it listens.

    Raises:
        ValueError: for a task that doesn't exist, or an action_repeat that gives no whole number of actions a second.
        ImportError: where Meta-World or a graphics library is missing; the message holds the line that installs it.
    """

    def __init__(
        self,
        task: str,
        image_size: int = 224,
        cameras: Sequence[str] = CAMERAS,
        action_repeat: int = 1,
        field_of_view: Mapping[str, float] | None = None,
        instruction: str | None = None,
    ):
        published = instruction_of(task)
        self.instruction = instruction or published
        self.fps = control_rate(action_repeat)
        self.task = task
        self.action_repeat = action_repeat
        self._image_size = image_size
        self._cameras = tuple(cameras)
        self._mujoco, env_class, expert_class = _import_simulator(task)
        self._expert = expert_class()
        self._env = env_class()
        self._start_from_seeds()
        self._set_up_cameras(field_of_view or {})
        self._renderer = None

    def _start_from_seeds(self) -> None:
        self._env._set_task_called = True
        self._env._freeze_rand_vec = False  # else every start is that of the last task set
        self._env.seeded_rand_vec = True
        self._env.max_path_length = sys.maxsize  # how long an episode lasts is the caller's business

    def _set_up_cameras(self, field_of_view: Mapping[str, float]) -> None:
        model, mujoco = self._env.model, self._mujoco
        known = [model.camera(i).name for i in range(model.ncam)]
        for camera in (*self._cameras, *field_of_view):
            if camera not in known:
                raise ValueError(f"{self.task} has no camera {camera!r}; it has {', '.join(known)}.")
        for camera, degrees in field_of_view.items():
            model.camera(camera).fovy = degrees
        model.vis.quality.offsamples = 0  # multisampling and shadows cost nine tenths of the drawing time
        model.site_group[:] = _HIDDEN
        if self.task in GOAL_DOTS:
            model.site(GOAL_DOTS[self.task]).group = _SHOWN
        self._visible = mujoco.MjvOption()
        self._visible.sitegroup[:] = 0
        self._visible.sitegroup[_SHOWN] = 1

    def reset(self, seed: int) -> None:
        """Put the scene into the start position that `seed` alone decides."""
        self._env.seed(seed)
        self._observation, _ = self._env.reset()
        self._mujoco.mj_forward(self._env.model, self._env.data)  # else the first picture shows the last episode
        now = self._env._get_curr_obs_combined_no_goal()  # what reset returned is from before that
        self._observation[: len(now)] = now

    def observe(self) -> dict[str, Any]:
        """Look: one (H, W, 3) uint8 picture a camera, the state as (4,) float32, and the instruction.

        The state is the hand's position in metres and the gripper's opening from 0 (closed) to 1.
        """
        pictures = {f"{IMAGES}.{camera}": self._render(camera) for camera in self._cameras}
        return {**pictures, STATE: self._observation[:4].astype(np.float32), TASK: self.instruction}

    def _render(self, camera: str) -> np.ndarray:
        mujoco = self._mujoco
        if self._renderer is None:
            self._renderer = _make_renderer(mujoco, self._env.model, self._image_size)
            atexit.register(self.close)  # MuJoCo ends EGL at exit, and what is still open then complains
        self._renderer.update_scene(self._env.data, camera=camera, scene_option=self._visible)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        picture = self._renderer.render()
        return picture[::-1, ::-1].copy() if camera == _UPSIDE_DOWN else picture

    def step(self, action: np.ndarray) -> EnvStep:
        """Hold a (4,) action, clipped to [-1, 1], for `action_repeat` simulator steps.

        Returns:
            Whether the task's own condition held at any of them, and how far things are.
        """
        action = np.clip(action, -1, 1).astype(np.float32)
        success = False
        for _ in range(self.action_repeat):
            self._observation, _, _, _, info = self._env.step(action)
            success = success or bool(info["success"])
        return EnvStep(success, self._measure(info))

    def _measure(self, info: Mapping[str, Any]) -> float:
        """Give a faucet's angle in rad, positive when open; of other tasks the distance left in m."""
        if self.task in MEASURED_JOINTS:
            return float(self._env.data.joint(MEASURED_JOINTS[self.task]).qpos[0])
        return float(info["obj_to_target"])

    def expert_action(self) -> np.ndarray:
        """Return what Meta-World's scripted policy would do now, (4,) float32 in [-1, 1].

        It alone is told where the goal is: the simulator blanks the goal in what it returns. It asks for more movement
        than the control takes; scaled down, unlike clipped, what is left keeps its direction.
        """
        informed = np.concatenate([self._observation[:-3], self._env._get_pos_goal()])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant")  # that it asks for too much
            action = np.asarray(self._expert.get_action(informed), np.float32)
        action[:3] /= max(1.0, np.abs(action[:3]).max())
        return np.clip(action, -1, 1)

    def close(self) -> None:
        """Give back the drawing context; the next look makes a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
            atexit.unregister(self.close)


def instruction_of(task: str) -> str:
    """Return the published English instruction of a task.

    Raises:
        ValueError: for a name that isn't one of Meta-World's 50; it names the nearest.
    """
    if task not in INSTRUCTIONS:
        near = difflib.get_close_matches(task, INSTRUCTIONS, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}?" if near else f"The tasks are: {', '.join(INSTRUCTIONS)}."
        raise ValueError(f"Meta-World has no task {task!r}. {hint}")
    return INSTRUCTIONS[task]


def control_rate(action_repeat: int) -> int:
    """Return the actions a second when each is held for `action_repeat` simulator steps.

    Raises:
        ValueError: where that is no whole number, since LeRobot's datasets hold whole frames a second.
    """
    if action_repeat < 1 or SIMULATOR_RATE % action_repeat:
        allowed = [k for k in range(1, SIMULATOR_RATE + 1) if SIMULATOR_RATE % k == 0]
        raise ValueError(f"action_repeat must divide {SIMULATOR_RATE}: one of {allowed}, not {action_repeat}.")
    return SIMULATOR_RATE // action_repeat


def _import_simulator(task: str) -> tuple[Any, type, type]:
    if "MUJOCO_GL" not in os.environ and graphics_problem():
        raise ImportError(graphics_problem())
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except (ImportError, AttributeError) as error:  # AttributeError: PyOpenGL where the library isn't there
        raise ImportError(graphics_problem() or f"Meta-World can't be imported: {error}") from error
    return mujoco, ALL_V3_ENVIRONMENTS[task], ENV_POLICY_MAP[task]


def _make_renderer(mujoco: Any, model: Any, side: int) -> Any:
    model.vis.global_.offwidth = max(side, model.vis.global_.offwidth)
    model.vis.global_.offheight = max(side, model.vis.global_.offheight)
    try:
        return mujoco.Renderer(model, side, side)
    except mujoco.FatalError as error:
        raise ImportError(graphics_problem() or f"MuJoCo can't draw: {error}") from error
