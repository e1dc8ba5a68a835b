"""How far a run is and who is in it, in plain words, from the files of its directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from fedgrove.ground import lines, words
from fedgrove.ground.lock import at_work
from fedgrove.ground.plain import Plain
from fedgrove.ground.statistics import mean, tail10
from fedgrove.job import Job
from fedgrove.privacy import accountant
from fedgrove.report import data
from fedgrove.report.data import Run
from fedgrove.report.facts import Tile

CLIENTS = 60  # rows of the table of clients
LATEST = 12  # events that are told one by one
_GONE = ("refused",)  # events after which a client is no part of the run any more


@dataclass(frozen=True)
class Standing:
    """A run as its directory shows it at one moment. ``seconds_left``: by the pace that was seen."""

    run: Run
    job: Job
    finished: bool
    running: bool
    events: Sequence[Plain]
    seconds_left: float | None = None

    @classmethod
    def of(cls, folder: Path) -> Standing:
        """Raises ``FedgroveError`` where a file of the directory is broken."""
        finished = (folder / "summary.json").is_file()
        if finished:
            run = data.load(folder)
        else:
            run = data.load_so_far(folder)
        return cls(
            run,
            Job.load(folder / "job.toml"),
            finished,
            at_work(folder),
            lines.read(folder / "events.jsonl", ("round", "client", "event", "reason")),
        )

    # ------------------------------------------------------------------- rounds
    @property
    def done(self) -> int:
        return int(self.run.summary["rounds"])

    @property
    def rounds(self) -> int:
        return self.job.run.rounds

    @property
    def word(self) -> str:
        """One sentence on where the run is."""
        of = f"round {self.done} of {self.rounds}"
        if self.finished and self.running:
            return f"The rounds are done ({of}); the report is being written."
        if self.finished:
            return f"Finished after {of}."
        if not self.running:
            return f"Stopped after {of}; it goes on with --resume."
        if self.done == 0:
            return f"Running: the first of {words.count(self.rounds, 'round')} is going on."
        if self.done == self.rounds:
            return f"The rounds are done ({of}); every client is measured and leaves."
        left = ""
        if self.seconds_left is not None:
            left = f", about {words.duration(self.seconds_left)} left"
        return f"Running: {of} is done{left}."

    @property
    def title(self) -> str:
        model = Path(self.job.model.name).name
        clients = words.count(len(self.run.clients), "client")
        data_name = self.run.data_name
        on = f" on {data_name}" if data_name else ""
        return f"{self.run.method}: {clients}, {model}{on}"

    # -------------------------------------------------------------------- tiles
    def tiles(self) -> list[Tile]:
        """The numbers of the last round, as far as there are any."""
        found = [Tile(f"{self.done} of {self.rounds}", "rounds done", self._to_come())]
        found += self._scores()
        if self.run.losses:
            *_, last = self.run.losses.values()
            found.append(Tile(words.number(mean(last)), "mean training loss"))
        sent = self.run.summary.get("bytes", {})
        if sent.get("up") or sent.get("down"):
            down = f"down {words.size(sent.get('down', 0))}"
            found.append(Tile(words.size(sent.get("up", 0)), "sent up so far", down))
        found += self._privacy()
        return found

    def _to_come(self) -> str:
        left = self.rounds - self.done
        if self.finished or left <= 0:
            return ""
        return f"{left} to come"

    def _scores(self) -> list[Tile]:
        history = list(self.run.history.values())
        if not history:
            return []
        percent = self.run.percent
        now = history[-1].values()
        found = []
        for label, statistic in (
            (f"mean {self.run.metric}", mean),
            ("tail: the 10th-percentile client", tail10),
        ):
            value = statistic(now)
            note = ""
            if len(history) > 1:
                before = statistic(history[-2].values())
                note = f"{words.change(value - before, percent=percent)} since the last time"
            score = words.score(value, percent=percent)
            found.append(Tile(words.typographic(score), label, words.typographic(note)))
        return found

    def _privacy(self) -> list[Tile]:
        section = self.job.privacy
        found = []
        if section.client_level:
            found.append(self._client_level())
        if section.example_level:
            told = (self.run.summary.get("privacy") or {}).get("example", {})
            value = "at the end"
            if told.get("epsilon") is not None:
                value = f"{told['epsilon']:.3g}"
            found.append(Tile(value, "largest ε for an example", "each client counts its own"))
        return found

    def _client_level(self) -> Tile:
        """ε for a client after the rounds so far, as the end of the run will tell it."""
        section = self.job.privacy
        label = "ε spent for a client"
        told = (self.run.summary.get("privacy") or {}).get("client")
        if told is not None:
            epsilon = told["epsilon"]
            delta = told["delta"]
        else:
            delta = section.delta or accountant.default_delta(max(1, len(self.run.clients)))
            spent = [(self.job.federation.fraction, self.done)]
            try:
                epsilon = accountant.epsilon(section.client_noise, spent, delta)
            except accountant.AccountantMissing:
                return Tile("–", label, "dp-accounting is not installed here")
        if epsilon is None:
            return Tile("none", "guarantee for a client", "no noise")
        return Tile(f"{epsilon:.3g}", label, f"at δ {delta:.2g}")

    # ------------------------------------------------------------------ clients
    @cached_property
    def _trained(self) -> dict[str, Plain]:
        """Each client's last line of training."""
        return {line["client"]: line for line in self.run.trained}

    @cached_property
    def _sent(self) -> Counter[str]:
        """Bytes up so far, by client."""
        found: Counter[str] = Counter()
        for line in self.run.trained:
            found[line["client"]] += line.get("bytes_up") or 0
        return found

    @cached_property
    def _trouble(self) -> dict[str, Plain]:
        """The event that says where a client is: of the last complete round or later, or one after
        which it is gone.
        """
        found: dict[str, Plain] = {}
        for event in self.events:
            recent = event["round"] >= max(1, self.done)
            if event["event"] in _GONE or recent:
                found[event["client"]] = event
            elif event["event"] == "joined":
                found.pop(event["client"], None)
        return found

    def present(self) -> str:
        """How many took part in the last round, and what became of others, in one sentence."""
        if self.done == 0:
            return f"{words.count(len(self.run.clients), 'client')} at the start."
        here = sum(line["round"] == self.done for line in self._trained.values())
        known = len(self.run.clients)
        said = f"{here:,} of {words.count(known, 'client')} trained in round {self.done}"
        kinds = Counter(event["event"] for event in self._trouble.values())
        told = [f"{count:,} {kind}" for kind, count in sorted(kinds.items())]
        if told:
            said += f"; {', '.join(told)}"
        return f"{said}."

    def clients(self) -> list[list[str]]:
        """Rows of text, the header first; who is in trouble comes first, then the weakest."""
        shown = sorted(self._names(), key=self._rank)[:CLIENTS]
        header = ["client", "now", self.run.metric, "loss", "sent up"]
        return [header, *(self._row(name) for name in shown)]

    def more_clients(self) -> str:
        rest = len(set(self._names())) - CLIENTS
        if rest > 0:
            return f"{words.count(rest, 'more client')} in metrics.jsonl."
        return ""

    def _names(self) -> Iterator[str]:
        yield from self.run.clients
        for name in self._trouble:
            if name not in self.run.clients:
                yield name

    def _rank(self, name: str) -> tuple[bool, float, str]:
        return name not in self._trouble, self._values.get(name, 2.0), name

    def _row(self, name: str) -> list[str]:
        score = words.score(self._values.get(name), percent=self.run.percent)
        line = self._trained.get(name, {})
        loss = words.number(line.get("loss"))
        return [
            words.shorten(name, 40),
            self._now(name),
            words.typographic(score),
            words.typographic(loss),
            words.size(self._sent[name]),
        ]

    @cached_property
    def _values(self) -> dict[str, float]:
        return self.run.values("metric")

    def _now(self, name: str) -> str:
        if name in self._trouble:
            event = self._trouble[name]
            return words.shorten(
                f"{event['event']} in round {event['round']}: {event['reason']}", 160
            )
        last = self._trained.get(name)
        if last is None:
            return "has not trained yet"
        if last["round"] == self.done:
            return f"trained in round {self.done}"
        return f"last trained in round {last['round']}"

    # ------------------------------------------------------------------- events
    def latest(self) -> list[list[str]]:
        """The last events, newest first, the header first; [] where nothing happened."""
        if not self.events:
            return []
        rows = [["client", "what happened", "round", "when"]]
        rows += [_told(event) for event in reversed(self.events[-LATEST:])]
        return rows


def _told(event: Plain) -> list[str]:
    return [
        words.shorten(str(event["client"]), 40),
        words.shorten(f"{event['event']}: {event['reason']}", 160),
        str(event["round"]),
        _when(event.get("time")),
    ]


def _when(time: object) -> str:
    try:
        at = datetime.fromisoformat(str(time)).astimezone()
    except ValueError:
        return "–"
    return f"{at:%d %b %H:%M:%S}"
