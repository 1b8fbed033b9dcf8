"""LeRobot's own environment, for the benchmarks that set it beside this project.

LeRobot pins other versions than ours, so it gets an environment of its own under build/: 8 GB, made once in some minutes, as
its users make theirs, with the torch and torchcodec that it asks for, and what its SmolVLA asks for. torchcodec needs
FFmpeg's libraries on the machine (`apt-get install ffmpeg`); without them LeRobot decodes through PyAV. What runs there is
`in_lerobot.py` and `lerobot_policy.py`.
"""

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build/lerobot-venv"
LEROBOT = "lerobot[smolvla]==0.4.4"

SCRIPT = Path(__file__).with_name("in_lerobot.py")
_MARK = ENVIRONMENT / "installed"
_NAMED = (
    "lerobot",
    "datasets",
    "torch",
    "torchvision",
    "torchcodec",
    "transformers",
    "av",
    "numpy",
    "pyarrow",
    "pillow",
)


def make_environment() -> Path:
    """Make LeRobot's own environment, or take the one that is there; return its interpreter."""
    python = ENVIRONMENT / "bin/python"
    if not is_made():
        venv.create(ENVIRONMENT, with_pip=True)  # over an older one, which lacks little
        subprocess.run([python, "-m", "pip", "install", "--quiet", LEROBOT], check=True)
        _MARK.write_text(LEROBOT)
    return python


def is_made() -> bool:
    """Say whether the environment is there and holds `LEROBOT`."""
    return _MARK.exists() and _MARK.read_text() == LEROBOT


def run_in_lerobot(python: Path, cache: Path, *arguments: object, script: Path = SCRIPT) -> dict[str, Any]:
    """Run a command of a script, and give what it says in its last line.

    Args:
        python: LeRobot's interpreter.
        cache: folder for what Hugging Face's libraries keep.
        arguments: the command's name and its arguments.
        script: runs there.

    Raises:
        SystemExit: with the end of what it wrote, where it fails.
    """
    command = [python, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables(cache))
    if done.returncode:
        raise SystemExit(f"{script.name} {' '.join(map(str, arguments))}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def variables(cache: Path) -> dict[str, str]:
    """Give the environment variables that it runs with."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache)}


def facts_of(python: Path, cache: Path) -> dict[str, Any]:
    """Say which versions LeRobot runs with, and which of its video backends work here."""
    return {"versions": versions_of(python), "video_backends": run_in_lerobot(python, cache, "backends")}


def versions_of(python: Path) -> dict[str, str]:
    """Give the versions of LeRobot and of what it stands on."""
    command = [python, "-m", "pip", "list", "--format", "json"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versions = {package["name"]: package["version"] for package in json.loads(listing)}
    return {name: versions[name] for name in _NAMED}


def working_backends(facts: dict[str, Any]) -> list[str]:
    """Name the video backends that work, the one that LeRobot takes by itself first."""
    return [name for name, problem in facts["video_backends"].items() if problem is None]
