"""Doing a comparison: the trials, then the runs, each in its own directory; what is done is not
done again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from fedgrove.compare.entries import Entry, Trial, trial_name
from fedgrove.compare.plan import Design, check
from fedgrove.compare.progress import Overall
from fedgrove.engines.pooled import all_rows
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.statistics import mean
from fedgrove.runs.directory import RunDirectory
from fedgrove.start import Opener
from fedgrove.tracking.metrics import metric_name
from fedgrove.use.result import Result


@dataclass(frozen=True)
class Attempt:
    """One trial of one method: its mean validation metric, or why it has none."""

    trial: Trial
    score: float | None
    problem: str = ""


@dataclass(frozen=True)
class Tuned:
    """The trials of one method and the best of them."""

    attempts: tuple[Attempt, ...] = ()
    chosen: Trial = ()


@dataclass(frozen=True)
class FinishedRun:
    """Every finished run, by label and in the order of the seeds."""

    plan: Design
    tuned: dict[str, Tuned]
    results: dict[str, list[Result]] = field(default_factory=dict)


def carry_out(plan: Design, progress: Overall) -> FinishedRun:
    """All trials and runs that are left to do."""
    directories = _directories(plan)
    if not all(RunDirectory(directory).finished() for directory in directories):
        check(plan)
    with progress.over(len(directories)):
        tuned = {entry.label: _tune(plan, entry, progress) for entry in plan.entries}
        done = FinishedRun(plan, tuned, {entry.label: [] for entry in plan.entries})
        for seed in plan.seeds:  # a comparison that is cut short has whole seeds
            for entry in plan.entries:
                chosen = tuned[entry.label].chosen
                result = _run(plan, entry, seed, chosen, progress)
                done.results[entry.label].append(result)
            _same_clients(done, seed)
    return done


def _directories(plan: Design) -> list[Path]:
    """Of all trials and runs."""
    found = []
    for entry in plan.entries:
        found += [plan.trial_directory(entry, trial) for trial in plan.trials]
        found += [plan.run_directory(entry, seed) for seed in plan.seeds]
    return found


def _run(
    plan: Design,
    entry: Entry,
    seed: int,
    chosen: Trial,
    progress: Overall,
) -> Result:
    from fedgrove.start import run

    directory = plan.run_directory(entry, seed)
    reference = plan.run_directory(plan.reference, seed)
    baselines = []
    if reference != directory:
        baselines.append(reference)
    title = f"{entry.label}, seed {seed}"
    if chosen:
        title += f", {trial_name(chosen)}"
    finished = RunDirectory(directory).finished()
    with progress.step(title, skipped=finished) as watch:
        return run(
            plan.run_job(entry, seed, chosen),
            directory,
            resume=True,
            callbacks=[watch],
            engine=engine_of(entry),
            baselines=baselines,
        )


def engine_of(entry: Entry) -> str | Opener:
    """Who trains: the clients of a simulation, or one who has all their rows."""
    if entry.pooled:
        return all_rows
    return "local"


def _tune(plan: Design, entry: Entry, progress: Overall) -> Tuned:
    """Every trial; the best by mean validation metric, ties to the value that was given first."""
    attempts = [_attempt(plan, entry, trial, progress) for trial in plan.trials]
    if not attempts:
        return Tuned()
    scored = [attempt for attempt in attempts if attempt.score is not None]
    if not scored:
        raise RunError(
            f"{entry.label}: no trial came to a finite result ({attempts[0].problem}); try smaller "
            f"values in --tune."
        )
    best = max(scored, key=lambda attempt: attempt.score or 0.0)
    return Tuned(tuple(attempts), best.trial)


def _attempt(plan: Design, entry: Entry, trial: Trial, progress: Overall) -> Attempt:
    import torch

    from fedgrove.start import run

    directory = plan.trial_directory(entry, trial)
    title = f"tuning {entry.label}, {trial_name(trial)}"
    finished = RunDirectory(directory).finished()
    with progress.step(title, skipped=finished) as watch:
        job = plan.trial_job(entry, trial)
        try:
            result = run(
                job,
                directory,
                resume=True,
                callbacks=[watch],
                engine=engine_of(entry),
            )
        except (AdapterError, torch.linalg.LinAlgError) as error:
            # A rate far too large makes weights that are not finite; that is this trial's result,
            # not the end.
            said = " ".join(str(error).split())
            return Attempt(trial, None, said)
    score = validation_score(result)
    if score is None:
        return Attempt(trial, None, "the validation loss is not finite")
    return Attempt(trial, score)


def validation_score(result: Result) -> float | None:
    """The mean over clients of the validation metric after the round whose models left; None where
    a client's loss is not finite.
    """
    where = ("validation", result.left_after)
    lines = [line for line in result.metrics() if (line["split"], line["round"]) == where]
    names = filter(None, map(metric_name, lines))
    name = next(names, None)
    if name is None:
        raise RunError(
            f"{result.path} has no validation measures of round {result.left_after}; remove it, and compare "
            f"again."
        )
    values = [line.get(name) for line in lines]
    losses = [line.get("loss") for line in lines]
    if None in values or None in losses:
        return None
    score = mean(values)
    if math.isfinite(score):
        return score
    return None


def _same_clients(done: FinishedRun, seed: int) -> None:
    """Whether all methods saw the same clients and splits, by what each run recorded of its
    data.
    """
    index = done.plan.seeds.index(seed)
    runs = [results[index] for results in done.results.values()]
    prints = [fingerprint(run.path) for run in runs]
    for run, found in zip(runs, prints, strict=True):
        if found != prints[0]:
            raise RunError(
                f"{run.path} was run on other data than {runs[0].path}, so they cannot be "
                f"compared; remove the runs of "
                f"seed {seed}, and compare again."
            )


def fingerprint(run_dir: Path) -> str:
    """The checksum of clients and splits in federation.json."""
    file = run_dir / "federation.json"
    try:
        text = file.read_text(encoding="utf-8")
        return str(json.loads(text)["fingerprint"])
    except (OSError, ValueError, KeyError):
        raise RunError(
            f"{file} is missing or broken; remove {run_dir}, and compare again."
        ) from None
