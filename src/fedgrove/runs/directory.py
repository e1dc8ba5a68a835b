"""A run's directory: who may use it, and what is written into it before the first round."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.ground import versions
from fedgrove.ground.errors import RunError
from fedgrove.ground.files import write_bytes, write_json
from fedgrove.ground.lock import LOCK, sign
from fedgrove.job import Job

if TYPE_CHECKING:
    from fedgrove.runs.engine import Engine
    from fedgrove.runs.stage import Stage

#: what a run may leave that was killed before it began
_BEFORE = (LOCK, "flower.json", "pooled.json", "sites", "events.jsonl")


_PLACE = (("run", "out"),)  # where a run lies is no part of it


class RunDirectory:
    """``RUN/`` with job.toml, federation.json, metrics.jsonl, checkpoints/, adapters/, summary.json
    and report.html.
    """

    def __init__(self, path: Path):
        self.path = path

    def finished(self) -> bool:
        return (self.path / "summary.json").exists() and (self.path / "report.html").exists()

    def admit(self, job: Job, *, resume: bool, longer: bool = False) -> Job:
        """The job to run here, before anything is written: refuses foreign or used directories.

        With ``resume`` the automatic choices recorded in the directory replace the job's "auto".

        Args:
            longer: whether the engine can go on with a recorded run to more rounds.
        """
        recorded = self.path / "job.toml"
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another --out.")
        if not resume:
            if self.path.exists() and any(self.path.iterdir()):
                if recorded.exists():
                    what = "holds a run"
                else:
                    what = "is not empty"
                raise RunError(
                    f"{self.path} {what} already; continue it with --resume, or choose another "
                    f"--out."
                )
            self._writable()
            return job
        if not recorded.exists():
            if self.path.exists() and any(
                entry.name not in _BEFORE for entry in self.path.iterdir()
            ):
                raise RunError(
                    f"{self.path} is not empty and holds no run (no job.toml); choose another "
                    f"--out."
                )
            self._writable()
            return job
        before = Job.load(recorded)
        now = job.resolved().adopting(before)
        different = differences(now, before)
        if longer and now.run.rounds > before.run.rounds:
            different = differences(now, before, but=[("run", "rounds")])
        if different:
            raise RunError(
                f"{self.path} holds another job ({'; '.join(different[:3])}); "
                "resume it with its own job, or choose another --out."
            )
        refuse_longer(now, before)
        return now

    def recorded_rounds(self) -> int | None:
        """``run.rounds`` of the run that is here; None where there is none."""
        recorded = self.path / "job.toml"
        if recorded.exists():
            return Job.load(recorded).run.rounds
        return None

    def open(self, stage: Stage[Engine], *, resume: bool) -> None:
        """Write what is known before the first round; of a run that goes on to more rounds, take
        away what says that it is finished.
        """
        if resume and (rounds := self.recorded_rounds()) not in (None, stage.job.run.rounds):
            refuse_other_layout(stage, rounds)
            (self.path / "summary.json").unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        table = self.path / "federation.json"
        described = {
            **stage.federation.table(),
            "source": stage.federation.source,
            "fingerprint": stage.fingerprint,
        }
        if table.exists() and resume:
            before = json.loads(table.read_text(encoding="utf-8")).get("fingerprint")
            if before != stage.fingerprint:
                raise RunError(
                    f"The data changed since {self.path} was begun; restore them, or choose "
                    f"another --out."
                )
        write_json(table, described)
        versions.write(self.path)
        write_bytes(self.path / "job.toml", stage.job.to_toml().encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time works on a run. The lock goes with the process, however it ends."""
        existed = self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / LOCK
        handle = os.open(file, os.O_CREAT | os.O_RDWR)
        try:
            _take(handle, self.path)
            sign(handle)
            yield
        except BaseException:
            _tidy(self.path, file, existed)
            raise
        finally:
            os.close(handle)
            file.unlink(missing_ok=True)

    def _writable(self) -> None:
        """Whether the directory can be made, asked before hours of work."""
        place = self.path
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise RunError(
                f"{self.path} cannot be made, because {place} is a file; choose another --out."
            )
        if not os.access(place, os.W_OK):
            raise RunError(
                f"{place} is not writable, so {self.path} cannot be made; choose another --out."
            )


def refuse_longer(job: Job, recorded: Job) -> None:
    """Raise ``RunError`` where the recorded run cannot go on to the job's rounds: its learning rate
    or its privacy would have been another.
    """
    if job.run.rounds == recorded.run.rounds:
        return
    train = job.train
    more = f"run.rounds is {recorded.run.rounds} there and {job.run.rounds} here, but "
    if train.schedule != "constant" or train.warmup_fraction > 0:
        raise RunError(
            f"{more}the learning rate follows the whole run (train.schedule = "
            f'"{train.schedule}", train.warmup_fraction = {train.warmup_fraction:g}); run the '
            f"longer job into another --out."
        )
    compared = job.run.keep == "best" or job.run.patience is not None
    if compared and recorded.run.rounds % job.run.eval_every:
        raise RunError(
            f"{more}its last round was evaluated out of turn (run.eval_every = "
            f"{job.run.eval_every}), and run.keep and run.patience compare evaluations; run the "
            f"longer job into another --out."
        )
    if job.privacy.example_level and train.final_local_epochs:
        raise RunError(
            f"{more}the local fine-tuning at its end (train.final_local_epochs) spent of the "
            f"examples' privacy, which the rounds do not count; run the longer job into another "
            f"--out."
        )


def refuse_other_layout(stage: Stage[Engine], rounds: int) -> None:
    """Raise ``RunError`` where the method lays out its rounds over the whole run, and otherwise
    over ``rounds``, the recorded number.
    """
    method = stage.method
    before = type(method)(method.options, replace(method.setting, rounds=rounds))
    if any(getattr(before, name) != getattr(method, name) for name in method.laid_out):
        raise RunError(
            f"run.rounds is {rounds} there and {stage.job.run.rounds} here, but {method.title} lays "
            f"out its phases over the whole run, so the longer run would have been another from "
            f"the start; run it into another --out."
        )


def differences(
    job: Job,
    recorded: Job,
    but: Collection[tuple[str, str]] = (),
) -> list[str]:
    """The keys in which two jobs differ, those of ``but`` and ``run.out`` aside."""
    mine, theirs = job.to_dict(), recorded.to_dict()
    found = []
    for section in mine:
        for key in sorted(set(mine[section]) | set(theirs[section])):
            if (section, key) in _PLACE or (section, key) in but:
                continue
            if mine[section].get(key) != theirs[section].get(key):
                found.append(
                    f"{section}.{key} is {theirs[section].get(key)!r} there, "
                    f"{mine[section].get(key)!r} here"
                )
    return found


def _take(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two processes are the user's to avoid
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"Another process is working on {path}; wait for it, or choose another --out."
        ) from None


def _tidy(path: Path, lock: Path, existed: bool) -> None:
    """Leave no trace of a run that failed before it began."""
    if not existed and list(path.iterdir()) == [lock]:
        lock.unlink()
        path.rmdir()
