"""Which runs a comparison consists of. All jobs come from one: only the method, the seed and what
was tuned differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedgrove.compare.entries import (
    Entry,
    Knob,
    Trial,
    parse_methods,
    parse_seeds,
    parse_tune,
    trial_name,
    trials,
)
from fedgrove.engines.pooled import pooled
from fedgrove.ground.errors import JobError, RunError
from fedgrove.job import Job
from fedgrove.job.toml import parse_assignment, value_text

TUNED_EPOCHS = 2  # of local fine-tuning, where the job has none
VALIDATION = 0.2  # of each client's examples, in trials, where the job holds none out
REFERENCE = "local"  # the method that is always beside the others


@dataclass(frozen=True)
class Design:
    """A comparison before anything has run. ``notes`` are the defaults that it filled in, in
    sentences.
    """

    base: Job
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    knobs: tuple[Knob, ...]
    tune_seed: int
    out: Path
    notes: tuple[str, ...]

    @cached_property
    def trials(self) -> list[Trial]:
        return trials(self.knobs)

    @property
    def reference(self) -> Entry:
        """Training alone: the entry that the reports of the others are set against."""
        return next(entry for entry in self.entries if entry.method == REFERENCE)

    def run_job(self, entry: Entry, seed: int, chosen: Trial = ()) -> Job:
        """The job of a reported run."""
        return self._job(entry, [f"run.seed={seed}"], chosen)

    def trial_job(self, entry: Entry, trial: Trial) -> Job:
        """The job of a trial: the same, with a validation split, on the tuning seed, and no more
        than a trial needs.
        """
        changes = [
            f"run.seed={self.tune_seed}",
            f"run.eval_every={self.base.run.rounds}",
            "run.noise=false",
            "train.final_local_epochs=0",
        ]
        if not self.base.data.validation_fraction:
            changes.append(f"data.validation_fraction={VALIDATION}")
        return self._job(entry, changes, trial)

    def run_directory(self, entry: Entry, seed: int) -> Path:
        return self.out / "runs" / entry.slug / f"seed-{seed}"

    def trial_directory(self, entry: Entry, trial: Trial) -> Path:
        return self.out / "tune" / entry.slug / trial_name(trial)

    def _job(
        self,
        entry: Entry,
        changes: Sequence[str],
        trial: Trial,
    ) -> Job:
        tuned = [f"{key}={value_text(value)}" for key, value in trial]
        try:
            job = self.base.override([*entry.settings, *tuned, *changes])
            if entry.pooled:
                return pooled(job)
            return job
        except JobError as error:
            raise JobError(f"{entry.label}: {error}") from None


def make_plan(
    job: Job,
    methods: str | Iterable[str],
    seeds: str | Iterable[int],
    *,
    out: Path,
    tune: Sequence[str] = (),
    settings: Sequence[str] = (),
    tune_seed: int | None = None,
) -> Design:
    """Everything settled and every job checked. Raises ``FedgroveError`` before anything is
    written.
    """
    for setting in settings:
        _allowed(setting)
    base, notes = job.override(settings), []
    if not base.train.final_local_epochs:
        base = base.replace(train={"final_local_epochs": TUNED_EPOCHS})
        notes.append(
            f"The job has no local fine-tuning, so every method got {TUNED_EPOCHS} epochs of it "
            f"after the last round "
            "(train.final_local_epochs); its results stand beside those without."
        )
    entries, chosen, knobs = parse_methods(methods), parse_seeds(seeds), parse_tune(tune)
    own = [entry for entry in entries if entry.method == REFERENCE]
    if not own:
        own = [Entry(REFERENCE, REFERENCE)]
        notes.append(
            "Training alone (local) was added, as the reference that every comparison needs."
        )
    entries = [*own, *(entry for entry in entries if entry.method != REFERENCE)]
    if tune_seed is None:
        tune_seed = max(chosen) + 1000
    if tune_seed in chosen or tune_seed < 0:
        raise JobError(
            f"--tune-seed {tune_seed} must be a seed that is not reported; choose one beside "
            f"{chosen}."
        )
    if knobs:
        notes.append(_tuning_note(base, knobs, tune_seed))
    plan = Design(
        base,
        tuple(entries),
        tuple(chosen),
        tuple(knobs),
        tune_seed,
        out,
        tuple(notes),
    )
    for entry in plan.entries:
        for trial in plan.trials or [()]:
            plan.run_job(entry, chosen[0], trial)
            plan.trial_job(entry, trial)
    _own_directory(out)
    return plan


def check(plan: Design) -> None:
    """Whether every method can run on these clients and this model, asked before hours of work."""
    from fedgrove.federation import build
    from fedgrove.runs.fit import refuse_unfit
    from fedgrove.runs.parts import Parts, base_of
    from fedgrove.runs.prepare import client_infos, data_choices, machine_choices

    def settled(entry: Entry) -> Job:
        return machine_choices(plan.run_job(entry, plan.seeds[0]).resolved())

    first = settled(plan.entries[0])
    federation = build(first)
    base = base_of(data_choices(first, federation))
    for entry in plan.entries:
        job = data_choices(settled(entry), federation)
        try:
            clients, held_out = client_infos(job, federation)
            parts = Parts.of(job, clients.values(), base=base)
            refuse_unfit(parts, clients.values(), held_out.values(), local=True)
        except JobError as error:
            raise JobError(f"{entry.label}: {error}") from None


def _tuning_note(base: Job, knobs: Sequence[Knob], tune_seed: int) -> str:
    count = len(trials(knobs))
    held = base.data.validation_fraction
    if held:
        where = f"the job's validation split ({100 * held:g} % of each client's examples)"
    else:
        where = (
            f"a validation split of {100 * VALIDATION:g} % of each client's examples, which only "
            f"the trials hold out"
        )
    values = ", ".join(
        f"{knob.short} in {{{', '.join(value_text(value) for value in knob.values)}}}"
        for knob in knobs
    )
    return (
        f"Every method was tuned by the same {count} trials ({values}) on the seed {tune_seed}, "
        f"which is not reported; "
        f"the best has the highest mean over clients on {where}."
    )


def _allowed(setting: str) -> None:
    """Refuses what would silently mean nothing, or not the same for all."""
    path, _ = parse_assignment(setting)
    key = ".".join(path)
    if path[0] == "method" and key != "method.uniform_rank":
        raise JobError(
            f"--set {setting}: a method's own keys go into --methods, for example "
            f"fedit[weights=uniform], because "
            "--set holds for all methods."
        )
    if key in ("run.seed", "run.out"):
        raise JobError(
            f"--set {setting}: in a comparison, use {'--seeds' if key == 'run.seed' else '--out'} "
            f"for that."
        )


def _own_directory(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose another --out.")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any((out / name).exists() for name in ("runs", "tune"))
    ):
        raise RunError(f"{out} is not empty and holds no comparison; choose another --out.")
