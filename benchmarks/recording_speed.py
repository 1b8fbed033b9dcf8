"""How fast are demonstrations recorded: physics, two cameras of 224 pixels, JPEG, and the dataset's files?"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.result import write_result
from hf_vla.data.lerobot_format import open_dataset

SCRIPT = Path(__file__).parent.parent / "data_scripts/record_metaworld.py"
EPISODES = 20


def main() -> None:
    """Record one task twice, a few episodes and many, and take the difference: what starting costs is left out."""
    with tempfile.TemporaryDirectory() as folder:
        few, few_seconds = record(Path(folder) / "few", 2)
        many, many_seconds = record(Path(folder) / "many", EPISODES)
    results = {
        "image_size": 224,
        "cameras": 2,
        "frames": 2 * many,
        "seconds_with_start": round(many_seconds, 1),
        "frames_per_second": round(2 * (many - few) / (many_seconds - few_seconds), 1),
        "frames_per_second_with_start": round(2 * many / many_seconds, 1),
    }
    print(results, write_result("recording_speed", results))


def record(out: Path, episodes: int) -> tuple[int, float]:
    """Record, and return the rows (each two frames) and the seconds."""
    start = time.perf_counter()
    command = [sys.executable, SCRIPT, "--out", out, "--task", f"reach-v3={episodes}", "--action-repeat", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return len(open_dataset(out).table), time.perf_counter() - start


if __name__ == "__main__":
    main()
