"""Whether this machine can draw a simulator's pictures, and what to install where it can't.

`python -m hf_vla.rollout.graphics` says it in one line and fails where something is missing.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

INSTALL_METAWORLD = 'pip install "hf-vla[sim]"'
INSTALL_GRAPHICS = "apt-get install -y libegl1 libgl1 libgl1-mesa-dri libgles2 libosmesa6"

_DRAW = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).close()"


@functools.cache
def graphics_problem() -> str | None:
    """Return None where pictures can be drawn; else what is missing, with the line that installs it.

    It draws in a process of its own, since MuJoCo can't be told to try again with another library. What it finds to
    work is left in MUJOCO_GL, which MuJoCo reads when it is imported, for this process and its children.
    """
    if importlib.util.find_spec("metaworld") is None:
        return f"Meta-World is not installed: {INSTALL_METAWORLD}"
    for backend in _backends():
        if _can_draw(backend):
            os.environ["MUJOCO_GL"] = backend
            os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's own threads get in the way of a worker on each core
            return None
    return f"MuJoCo finds no graphics library to draw with (tried {', '.join(_backends())}): {INSTALL_GRAPHICS}"


def _backends() -> Sequence[str]:
    asked = os.environ.get("MUJOCO_GL")
    if asked:
        return (asked,)
    return ("egl", "osmesa") if sys.platform == "linux" else ("glfw",)


def _can_draw(backend: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": backend}
    probe = subprocess.run([sys.executable, "-c", _DRAW], env=environment, capture_output=True, timeout=120)
    return probe.returncode == 0


if __name__ == "__main__":
    sys.exit(graphics_problem())
