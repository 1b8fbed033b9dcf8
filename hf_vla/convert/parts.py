"""Convert a source file by file, several at a time, into datasets that are whole or not there, and put those together.

What was killed goes on where it was: each file of the source becomes a part, a LeRobot dataset of its own in a folder beside
the result, and is done once its tally is written. The result appears when all parts are there.
"""

import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_vla.convert.convention import Convention, names_of, read_columns, read_task
from hf_vla.convert.episode import RawEpisode, Shard, Source
from hf_vla.data.lerobot_merge import merge_datasets
from hf_vla.data.lerobot_writer import LeRobotWriter, image_feature, picture_shape, vector_feature
from hf_vla.sample import ACTION, IMAGES, STATE
from hf_vla.workers import WORKERS

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Settings:
    """All that decides what is written, but the source."""

    convention: Convention
    task: str | None = None
    """Instruction of episodes that have none."""
    store: str = "image"
    """`image`, `h264` or `av1`."""
    skip_broken: bool = False
    """Whether an episode that can't be used is left out and counted, instead of ending the conversion."""


@dataclass
class Tally:
    """What became of the episodes."""

    episodes: int = 0
    frames: int = 0
    skipped: list[str] = field(default_factory=list)
    """A line for each episode that was left out: where it is, and why."""

    def add(self, other: "Tally") -> None:
        """Count what another has counted, too."""
        self.episodes += other.episodes
        self.frames += other.frames
        self.skipped += other.skipped


def convert(
    source: Source,
    out: Path,
    settings: Settings,
    workers: int = 1,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Tally:
    """Convert a source into the LeRobotDataset v3.0 folder `out`, going on with what an earlier call left.

    Args:
        source: recordings.
        out: the folder that will be the dataset; must not exist yet.
        settings: how they are read and kept.
        workers: processes; each converts a file at a time.
        progress: called with the step (`convert` or `merge`), and how many files of how many are done.

    Raises:
        FileExistsError: where `out` is there, or parts that other settings made, or another call is at work.
        ValueError: names file and episode of what can't be used.
        OSError: where there is no room; what was finished is kept.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is already there; remove it, or write the dataset to another folder.")
    shards = source.shards()
    folder = out.parent / f".{out.name}.parts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _check_plan(folder, _describe(shards, settings))
            tallies = _convert_missing(source, shards, folder, settings, workers, progress)
            total = Tally()
            for number in range(len(shards)):
                total.add(tallies[number])
            _merge(folder, out, total, settings, len(shards), progress)
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(
                f"{out}: no room left to write ({error.strerror}). Parts that are finished are kept in {folder}; make room "
                "and run the same command again."
            ) from None
        raise
    return total


def _convert_missing(
    source: Source, shards: list[Shard], folder: Path, settings: Settings, workers: int, progress: Callable
) -> dict[int, Tally]:
    """Convert the files that have no tally yet; the first failure ends it."""
    tallies = {n: Tally(**json.loads(_tally_file(folder, n).read_text())) for n in _finished(folder, len(shards))}
    for leftover in folder.glob(".*.partial-*"):
        shutil.rmtree(leftover)
    missing = [number for number in range(len(shards)) if number not in tallies]
    progress("convert", len(tallies), len(shards))
    if not missing:
        return tallies
    with ProcessPoolExecutor(min(workers, len(missing)), WORKERS, _quiet_av1) as pool:
        jobs = {pool.submit(convert_shard, source, shards[n], _part(folder, n), settings): n for n in missing}
        try:
            for job in as_completed(jobs):
                tallies[jobs[job]] = job.result()
                progress("convert", len(tallies), len(shards))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return tallies


def convert_shard(source: Source, shard: Shard, part: Path, settings: Settings) -> Tally:
    """Convert one file into one part; runs in a worker.

    Raises:
        ValueError: names file and episode of what can't be used.
    """
    tally, writer = Tally(), None
    if part.exists():  # written whole, and killed before its tally was
        shutil.rmtree(part)
    try:
        for episode in source.episodes(shard):
            columns, task = _read(episode, shard, settings, tally)
            if columns is None:
                continue
            writer = writer or _open_writer(part, columns, settings)
            _add(writer, columns, task, shard, episode)
            tally.episodes, tally.frames = tally.episodes + 1, tally.frames + len(columns[ACTION])
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.discard()
    _write_json(_tally_file(part.parent, int(part.name.split("-")[1])), asdict(tally))
    return tally


def _read(episode: RawEpisode, shard: Shard, settings: Settings, tally: Tally) -> tuple[dict[str, Any] | None, str]:
    """Read an episode, or note why it is left out: no step remains, or it is broken and may be skipped."""
    where = f"{shard.file}: episode {episode.name}"
    try:
        columns = read_columns(episode, settings.convention, encode=settings.store == "image")
        task = read_task(episode, settings.convention, settings.task)
    except ValueError as error:
        if not settings.skip_broken:
            raise ValueError(f"{where}: {error}. Mend it, or leave such episodes out with --skip-broken.") from None
        tally.skipped.append(f"{where}: {error}")
        return None, ""
    if not len(columns[ACTION]):
        tally.skipped.append(f"{where}: no step is left after those that the convention drops")
        return None, ""
    return columns, task


def _open_writer(part: Path, columns: dict[str, Any], settings: Settings) -> LeRobotWriter:
    convention, storage = settings.convention, "image" if settings.store == "image" else "video"
    features = {
        f"{IMAGES}.{name}": image_feature(*picture_shape(columns[f"{IMAGES}.{name}"][0])[:2], storage)
        for name in convention.cameras
    }
    features |= {
        STATE: vector_feature(names_of(convention.state)),
        ACTION: vector_feature(names_of(convention.action)),
    }
    codec = settings.store if storage == "video" else "h264"
    return LeRobotWriter(part, convention.fps, features, convention.robot_type, codec)


def _add(writer: LeRobotWriter, columns: dict[str, Any], task: str, shard: Shard, episode: RawEpisode) -> None:
    try:
        writer.add_episode(columns, task)
    except ValueError as error:
        raise ValueError(f"{shard.file}: episode {episode.name}: {error}") from None


def _merge(folder: Path, out: Path, total: Tally, settings: Settings, count: int, progress: Callable) -> None:
    parts = [_part(folder, number) for number in range(count) if _part(folder, number).exists()]
    if not parts:
        reasons = Counter(line.rpartition(": ")[2] for line in total.skipped)
        raise ValueError(
            f"{out}: no episode could be used: " + "; ".join(f"{n} x {why}" for why, n in reasons.items())
        )
    for leftover in out.parent.glob(f".{out.name}.partial-*"):
        shutil.rmtree(leftover)
    facts = {"convention": asdict(settings.convention), "skipped": total.skipped}
    merge_datasets(parts, out, facts, lambda number: progress("merge", number + 1, len(parts)))


def _describe(shards: list[Shard], settings: Settings) -> dict[str, Any]:
    files = [[str(shard.file.resolve()), shard.file.stat().st_size] for shard in shards]
    return {"settings": asdict(settings), "files": files}


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse to go on with parts that were made of something else, or otherwise."""
    file = folder / "plan.json"
    if not file.exists():
        _write_json(file, plan)
    elif json.loads(file.read_text()) != json.loads(json.dumps(plan)):
        raise FileExistsError(
            f"{folder} holds parts of a conversion with another source or other settings; give those again to go on, "
            "or remove the folder."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{folder}: another conversion is at work on it; wait for it, or end it.") from None
        yield


def _finished(folder: Path, count: int) -> list[int]:
    return [number for number in range(count) if _tally_file(folder, number).exists()]


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}"


def _tally_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.json"


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    aside.replace(path)


def _quiet_av1() -> None:
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder says a page for every file otherwise
