"""From a dataset to its page."""

from collections.abc import Sequence
from pathlib import Path

from hf_vla.inspection.finding import Finding
from hf_vla.inspection.number_checks import Vector, check_overlap
from hf_vla.inspection.page import write_page
from hf_vla.inspection.recordings import Recordings, read_actions, read_lerobot
from hf_vla.inspection.rlds import read_rlds
from hf_vla.sample import ACTION


def inspect(
    source: str | Path, output: str | Path, revision: str | None = None, against: Sequence[str | Path] = ()
) -> Recordings:
    """Look at a dataset, and write what was found as one HTML page.

    Args:
        source: folder or Hub id of a LeRobot dataset, or folder of an RLDS one.
        output: the page.
        revision: of a Hub repo.
        against: LeRobot datasets that are judged by, whose episodes must not be in this one.

    Returns:
        What the page shows; its `findings` are sorted, the worst first. A dataset that can't be opened has one.

    Raises:
        ValueError, OSError: where a dataset to judge by can't be opened.
    """
    others = [read_actions(other) for other in against]
    if is_rlds(Path(source)):
        recordings = read_rlds(source)
    else:
        recordings = read_lerobot(source, revision)
    recordings.add(_compare(recordings, others))
    write_page(recordings, Path(output))
    return recordings


def is_rlds(folder: Path) -> bool:
    """Tell an RLDS folder, or one above it, by its `features.json`."""
    return (folder / "features.json").is_file() or any(folder.glob("*/features.json"))


def _compare(recordings: Recordings, others: Sequence[Vector]) -> list[Finding]:
    """Look for shared episodes; a dataset that can't be opened has no actions, and a finding that says so."""
    ours = [vector for vector in recordings.vectors if vector.key == ACTION]
    return [finding for actions in ours for finding in check_overlap(actions, others) if finding.kind == "overlap"]
