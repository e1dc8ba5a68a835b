"""Which round's models leave (``run.keep``), and when a run has seen enough (``run.patience``).

A round's score is the mean over the clients that train of the task's metric, on the validation rows
where the job holds some out, else on the test rows: then the figures of the kept round are
optimistic, because those rows chose it. Only rounds in which every client was measured count, and
of a method with phases only those in which its models have all their parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgrove.ground.plain import Given, Plain
from fedgrove.ground.statistics import mean, present

if TYPE_CHECKING:
    from fedgrove.runs.parts import Parts

NONE = 0  # the best round, as long as there is none


@dataclass(frozen=True)
class Rule:
    """What a job and its method say of the choice."""

    best: bool  # the best round's models leave, not the last one's
    patience: int | None  # evaluations without a better one after which the run stops
    split: str
    metric: str
    first: int  # round that can be chosen

    @classmethod
    def of(cls, parts: Parts) -> Rule:
        run = parts.job.run
        if parts.job.data.validation_fraction:
            split = "validation"
        else:
            split = "test"
        first = min(parts.method.complete_from, run.rounds)
        return cls(run.keep == "best", run.patience, split, parts.task.metric, first)

    @property
    def asked(self) -> bool:
        """Whether rounds are compared at all."""
        return self.best or self.patience is not None


@dataclass
class Choice:
    """What the evaluations have shown so far; part of every checkpoint where it is asked for."""

    rule: Rule
    round: int = NONE  # the best so far
    score: float = 0.0  # its own
    since: int = 0  # evaluations after it

    def look(self, number: int, lines: Sequence[Given], clients: Collection[str]) -> None:
        """Take in the lines of an evaluated round."""
        if not self.rule.asked or number < self.rule.first:
            return
        mine = [line for line in lines if line["split"] == self.rule.split]
        values = present(line.get(self.rule.metric) for line in mine)
        if len(values) < len(clients):  # of other clients it is another score
            return
        score = mean(values)
        if self.round == NONE or score > self.score:
            self.round, self.score, self.since = number, score, 0
        else:
            self.since += 1

    def start_anew(self) -> None:
        """Others are measured from now on, so what was measured before does not compare."""
        self.round, self.score, self.since = NONE, 0.0, 0

    @property
    def kept(self) -> int:
        """The round whose state is kept beside the newest; ``NONE`` where none is."""
        if self.rule.best:
            return self.round
        return NONE

    @property
    def enough(self) -> bool:
        """Whether the run stops here."""
        return self.rule.patience is not None and self.since >= self.rule.patience

    def notes(self) -> Plain:
        """For the checkpoint."""
        return {"round": self.round, "score": self.score, "since": self.since}

    def restore(self, notes: Given) -> None:
        self.round, self.since = int(notes["round"]), int(notes["since"])
        self.score = float(notes["score"])

    def told(self, done: int) -> Plain:
        """What the summary says of it, after ``done`` rounds; {} where nothing was asked for."""
        if not self.rule.asked:
            return {}
        found: Plain = {"round": self.kept or done, "split": self.rule.split}
        if self.round:
            found["best"] = {"round": self.round, self.rule.metric: self.score}
        return {"kept": found, "stopped_early": self.enough}

    def sentence(self, done: int) -> str:
        """The same for people; "" where nothing was asked for."""
        if not self.rule.asked:
            return ""
        if self.enough:
            said = f"stopped after round {done}: {self.since} evaluations without a better one; "
        else:
            said = ""
        which = f"the models of round {self.kept or done} are kept"
        if self.round:
            rows = f"{self.rule.split} {self.rule.metric}"
            said += f"{which} (best mean {rows}: {self.score:.4g} in round {self.round})"
        else:
            said += f"{which} (in no round was every client measured)"
        return said
