"""Doing a comparison: the trials, then the runs, each in its own directory; what is done is not
done again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from fedgrove.compare.entries import Entry, Trial, trial_name
from fedgrove.compare.plan import Plan, check
from fedgrove.compare.progress import Overall
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.statistics import mean
from fedgrove.runs.directory import RunDirectory
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
class Done:
    """Every finished run, by label and in the order of the seeds."""

    plan: Plan
    tuned: dict[str, Tuned]
    results: dict[str, list[Result]] = field(default_factory=dict)


def carry_out(plan: Plan, progress: Overall) -> Done:
    """All trials and runs that are left to do."""
    trials = [(entry, trial) for entry in plan.entries for trial in plan.trials]
    directories = [plan.trial_directory(*each) for each in trials]
    directories += [
        plan.run_directory(entry, seed) for entry in plan.entries for seed in plan.seeds
    ]
    if not all(RunDirectory(directory).finished() for directory in directories):
        check(plan)
    with progress.over(len(directories)):
        tuned = {entry.label: _tune(plan, entry, progress) for entry in plan.entries}
        done = Done(plan, tuned, {entry.label: [] for entry in plan.entries})
        for seed in plan.seeds:  # a comparison that is cut short has whole seeds
            for entry in plan.entries:
                done.results[entry.label].append(
                    _run(plan, entry, seed, tuned[entry.label].chosen, progress)
                )
            _same_clients(done, seed)
    return done


def _run(plan: Plan, entry: Entry, seed: int, chosen: Trial, progress: Overall) -> Result:
    from fedgrove.start import run

    directory, reference = plan.run_directory(entry, seed), plan.run_directory(plan.reference, seed)
    title = f"{entry.label}, seed {seed}" + (f", {trial_name(chosen)}" if chosen else "")
    with progress.step(title, skipped=RunDirectory(directory).finished()) as watch:
        return run(
            plan.run_job(entry, seed, chosen),
            directory,
            resume=True,
            callbacks=[watch],
            baselines=[reference] if reference != directory else [],
        )


def _tune(plan: Plan, entry: Entry, progress: Overall) -> Tuned:
    """Every trial; the best by mean validation metric, ties to the value that was given first."""
    attempts = tuple(_attempt(plan, entry, trial, progress) for trial in plan.trials)
    if not attempts:
        return Tuned()
    scored = [attempt for attempt in attempts if attempt.score is not None]
    if not scored:
        raise RunError(
            f"{entry.label}: no trial came to a finite result ({attempts[0].problem}); try smaller "
            f"values in --tune."
        )
    return Tuned(attempts, max(scored, key=lambda attempt: attempt.score or 0.0).trial)


def _attempt(plan: Plan, entry: Entry, trial: Trial, progress: Overall) -> Attempt:
    import torch

    from fedgrove.start import run

    directory = plan.trial_directory(entry, trial)
    title = f"tuning {entry.label}, {trial_name(trial)}"
    with progress.step(title, skipped=RunDirectory(directory).finished()) as watch:
        try:
            result = run(plan.trial_job(entry, trial), directory, resume=True, callbacks=[watch])
        except (AdapterError, torch.linalg.LinAlgError) as error:
            # A rate far too large makes weights that are not finite; that is this trial's result,
            # not the end.
            return Attempt(trial, None, " ".join(str(error).split()))
    score = validation_score(result)
    return Attempt(trial, score, "" if score is not None else "the validation loss is not finite")


def validation_score(result: Result) -> float | None:
    """The mean over clients of the validation metric after the last round; None where a client's
    loss is not finite.
    """
    last = result.summary["rounds"]
    lines = [
        line for line in result.metrics() if line["split"] == "validation" and line["round"] == last
    ]
    name = next((found for line in lines if (found := metric_name(line))), None)
    if name is None:
        raise RunError(
            f"{result.path} has no validation measures of round {last}; remove it, and compare "
            f"again."
        )
    values = [line.get(name) for line in lines]
    if any(line.get("loss") is None for line in lines) or any(value is None for value in values):
        return None
    score = mean(values)
    if math.isfinite(score):
        return score
    return None


def _same_clients(done: Done, seed: int) -> None:
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
    try:
        return str(
            json.loads((run_dir / "federation.json").read_text(encoding="utf-8"))["fingerprint"]
        )
    except (OSError, ValueError, KeyError):
        raise RunError(
            f"{run_dir / 'federation.json'} is missing or broken; remove {run_dir}, and compare "
            f"again."
        ) from None
