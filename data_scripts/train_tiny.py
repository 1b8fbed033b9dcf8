"""The main job from nothing, on two cores and no GPU: record, train, evaluate, roll out, report.

`make train-tiny` runs it. Where nothing can be drawn it trains on the sample in tests/data and skips the rollouts, by name.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from hf_vla.console import set_up_logging

if __name__ in ("__main__", "__mp_main__"):  # the latter in processes that roll out
    set_up_logging()  # before the libraries imported below say a word

from hf_vla.evaluation import evaluate_offline, evaluate_rollouts
from hf_vla.report import write_report
from hf_vla.rollout.metaworld_env import graphics_problem

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/tiny.json"
SAMPLE = ROOT / "tests/data/metaworld_sample"
EPISODES = {"button-press-topdown-v3": 150, "reach-v3": 450, "faucet-open-v3": 110, "faucet-close-v3": 110}
"""Reaching needs the finest look of the four, and so the most starts."""
DISTURBED = ["--noise", "0.7", "--noise-std", "0.5"]
"""Most demonstrations are pushed off their way, so that the policy learns to come back."""


def main() -> None:
    """Run the steps in order, saying what each is and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="where demonstrations are, or are recorded to")
    parser.add_argument("--run", type=Path, required=True, help="run directory to make")
    arguments = parser.parse_args()
    dataset = timed("Record demonstrations", record, arguments.dataset)
    timed("Train", train, dataset, arguments.run)
    timed("Evaluate on held-out episodes", evaluate_offline, arguments.run)
    timed("Roll out in the simulator", evaluate_rollouts, arguments.run)
    say_goodbye(arguments.run, write_report(arguments.run))


def timed(title: str, step, *arguments):
    """Run one step under its title."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    result = step(*arguments)
    print(f"== {title}: {time.perf_counter() - start:.0f} s", flush=True)
    return result


def record(dataset: Path) -> Path:
    """Record the recipe's tasks as its `evaluation` section says they are shown, unless that was done before."""
    problem = graphics_problem()
    if problem:
        print(f"Nothing can be recorded: {problem}\nTraining on the committed sample instead.")
        return SAMPLE
    if dataset.exists():
        print(f"{dataset} is there already.")
        return dataset
    wanted = json.loads(RECIPE.read_text())["evaluation"]
    shown = ["--image-size", str(wanted["image_size"]), "--action-repeat", str(wanted["action_repeat"])]
    for camera, degrees in wanted["field_of_view"].items():
        shown += ["--field-of-view", f"{camera}={degrees}"]
    tasks = [word for task in wanted["tasks"] for word in ("--task", f"{task}={EPISODES[task]}")]
    run(sys.executable, ROOT / "data_scripts/record_metaworld.py", "--out", dataset, *tasks, *shown, *DISTURBED)
    return dataset


def train(dataset: Path, directory: Path) -> None:
    """Train the tiny recipe on every core, in a process of its own, as a user would."""
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count())]
    script = [ROOT / "hf_vla/train.py", RECIPE, "--set", f"data.dataset={dataset}", "--output", directory]
    run(sys.executable, *launch, *plain, *script)


def run(*command) -> None:
    """Run a command; its failure is ours, and what it said stands above."""
    done = subprocess.run([str(word) for word in command], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def say_goodbye(directory: Path, report: Path) -> None:
    """Say where the report is, and how to use what was trained."""
    print(f"""
Report: {report}

Use the policy:

    from hf_vla.policy import Policy
    policy = Policy.from_pretrained("{directory / "model"}")
    policy.reset()
    action = policy.select_action(observation)  # observation.images.<camera>, observation.state, task
    print(action)  # in the dataset's own units
""")


if __name__ == "__main__":
    main()
