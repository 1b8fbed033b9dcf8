"""What the counts of a run show: nothing is claimed unless two 95 % intervals lie apart."""

from typing import NamedTuple

from .run_files import Count, Run


class Finding(NamedTuple):
    """What the counts show about one question; verdict is `shown`, `partly`, `not shown` or `not measured`."""

    question: str
    verdict: str
    text: str


def beats_random(run: Run) -> Finding:
    """Compare success with that of random actions."""
    return _compare(
        "Does it do better than chance?",
        run.counts("rollouts"),
        run.counts("rollouts_random"),
        "rollouts_random",
        "More successes than random actions",
    )


def sees(run: Run) -> Finding:
    """Compare success with that of the same policy when every picture is the mean picture."""
    return _compare(
        "Does it use what it sees?",
        run.counts("rollouts"),
        run.counts("rollouts_without_pictures"),
        "rollouts_without_pictures",
        "More successes with its pictures than with the mean picture in their place",
        " It relies on its pictures there; whether the task needs them, only a control trained without could tell.",
    )


def listens(run: Run) -> Finding:
    """Compare how often the scene's own task is done under its own and under another instruction.

    Doing what the other instruction says proves nothing by itself: on a shared scene, a policy deaf to its instruction
    that always does one of two tasks scores full marks on one of the swaps.
    """
    swapped = run.counts("rollouts_swapped_instruction")
    finding = _compare(
        "Does it follow its instruction?",
        run.counts("rollouts"),
        {task: count.own_task for task, count in swapped.items() if count.own_task},
        "rollouts_swapped_instruction" if not swapped else "own_task_successes",
        "The scene's own task is done more often when the instruction names it than when it names another task",
    )
    told = "; ".join(f"{task}: {count.successes} of {count.episodes}" for task, count in swapped.items())
    return finding._replace(text=f"{finding.text} Told otherwise, it did as told in: {told}.") if told else finding


def _compare(
    question: str, ours: dict[str, Count], other: dict[str, Count], key: str, claim: str, meaning: str = ""
) -> Finding:
    """Claim something only of tasks whose two intervals lie apart."""
    tasks = [task for task in ours if task in other]
    if not tasks:
        missing = key if ours else "rollouts"
        return Finding(question, "not measured", f"Not measured: run.json has no counts under {missing}.")
    above = [task for task in tasks if ours[task].bounds[0] > other[task].bounds[1]]
    below = [task for task in tasks if ours[task].bounds[1] < other[task].bounds[0]]
    unclear = [task for task in tasks if task not in above and task not in below]
    text = f"{claim}: {_list(above)}.{meaning}" if above else f"Not shown on any task: {claim[0].lower()}{claim[1:]}."
    if unclear:
        text += f" The intervals overlap, so nothing can be said, on {_list(unclear)}."
    if below:
        text += f" The opposite holds on {_list(below)}."
    return Finding(question, ("shown" if len(above) == len(tasks) else "partly") if above else "not shown", text)


def _list(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
