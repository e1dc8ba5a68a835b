"""One training: some parties and the server, epoch by epoch, with its files.

``FOLDER/metrics.jsonl`` (a line for each epoch), ``events.jsonl`` (batches that were skipped) and
``checkpoints/``. A course that was stopped goes on after its last whole epoch, to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgrove.ground import lines
from fedgrove.ground.ctrlc import stop_if_pressed
from fedgrove.ground.errors import RunError
from fedgrove.ground.plain import Plain
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.vertical.guard import Guard
from fedgrove.vertical.job import VerticalJob
from fedgrove.vertical.messages import Message, Traffic, carried_down, carried_up, finite
from fedgrove.vertical.party import Party, Rows
from fedgrove.vertical.server import Server
from fedgrove.vertical.tables import Entities

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Measured:
    """Of the test entities, after the last epoch."""

    accuracy: float
    loss: float
    #: accuracy where each party's shares are replaced by their mean: what is lost without it
    without: Mapping[str, float]
    #: ‖W_k‖ of each party; None where it would have to tell it beside its guarded messages
    importance: Mapping[str, float | None]
    traffic: Traffic
    messages: int
    skipped: int


class Course:
    """``parties`` learn with ``server``; ``folder`` is its own. ``guard`` counts the messages."""

    def __init__(
        self,
        job: VerticalJob,
        entities: Entities,
        parties: Sequence[Party],
        server: Server,
        guard: Guard,
        folder: Path,
    ):
        self.job = job
        self.entities = entities
        self.parties = parties
        self.server = server
        self.guard = guard
        self.folder = folder
        self.traffic = Traffic()
        self.skipped = 0
        self.checkpoints = Checkpoints(folder / "checkpoints")

    # ---------------------------------------------------------------------- epochs
    def run(self, told: Callable[[], None]) -> Measured:
        """All epochs that are left; ``told`` is called after each. Raises ``RunError`` where nothing
        can be learnt from any batch.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self._resumed()
        for _ in range(done):
            told()
        for epoch in range(done + 1, self.job.settings.train.epochs + 1):
            self._epoch(epoch)
            told()
        shares = self._test_shares()
        return self._measured(shares)

    def _epoch(self, epoch: int) -> None:
        total = 0.0
        seen = 0
        for number, rows in enumerate(self._batches(self.entities.train)):
            stop_if_pressed()
            found = self._batch(epoch, number, rows)
            if found is not None:
                total += found * len(rows)
                seen += len(rows)
        if not seen:
            raise RunError(
                f"No message of epoch {epoch} was finite: the training diverged; lower train.lr, or "
                f"set method.prox = true, and start again in a new directory."
            )
        line: Plain = {"round": epoch, "loss": total / seen}
        settings = self.job.settings
        # after the last epoch ``run`` measures, of which summary.json tells
        if epoch % settings.run.eval_every == 0 and epoch < settings.train.epochs:
            accuracy, loss = self._scored(self._sum(self._test_shares()))
            line |= {"accuracy": accuracy, "test_loss": loss}
        line |= self.traffic.plain()
        lines.append(self.folder / METRICS, line)
        self._save(epoch)

    def _batch(self, epoch: int, number: int, rows: Rows) -> float | None:
        """The loss that the messages of a batch gave; None where one of them was not finite: then
        nobody moves, and the multipliers of its entities stay.
        """
        messages = self._messages(rows)
        for name, message in messages.items():
            if not finite(message.rows):
                self.skipped += 1
                event = {"round": epoch, "event": "skipped", "batch": number, "party": name}
                lines.append(self.folder / EVENTS, {**event, "why": "its message is not finite"})
                return None
        sums = self._sum(self.server.shares(messages))
        loss = F.cross_entropy(sums, self.entities.labels[list(rows)])
        answers = self.server.answers(rows, messages)
        for party in self.parties:
            answer = carried_down(answers[party.name], self.traffic)
            party.fit(rows, answer, epoch, number)
        return float(loss)

    def _messages(self, rows: Rows) -> dict[str, Message]:
        """What each party says of these entities, as it reaches the server."""
        found = {}
        for party in self.parties:
            message = self.guard.protected(party.speak(rows), party.name)
            found[party.name] = carried_up(message, self.traffic)
        self.guard.messages += 1
        return found

    def _batches(self, rows: Rows) -> Iterator[Rows]:
        size = self.job.settings.train.batch_size
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    # -------------------------------------------------------------------- measures
    def _test_shares(self) -> dict[str, Tensor]:
        """Each party's shares of the test entities, [n, c] by its name."""
        parts: dict[str, list[Tensor]] = {party.name: [] for party in self.parties}
        for rows in self._batches(self.entities.test):
            stop_if_pressed()
            for name, share in self.server.shares(self._messages(rows)).items():
                parts[name].append(share)
        return {name: torch.cat(own) for name, own in parts.items()}

    @staticmethod
    def _sum(shares: Mapping[str, Float[Tensor, "b c"]]) -> Float[Tensor, "b c"]:
        return torch.stack(list(shares.values())).sum(0)

    def _scored(self, logits: Float[Tensor, "n c"]) -> tuple[float, float]:
        """(accuracy, loss) on the test entities."""
        labels = self.entities.labels[list(self.entities.test)]
        right = (logits.argmax(-1) == labels).double().mean()
        return float(right), float(F.cross_entropy(logits, labels))

    def _measured(self, shares: Mapping[str, Float[Tensor, "n c"]]) -> Measured:
        whole = self._sum(shares)
        accuracy, loss = self._scored(whole)
        without = {}
        for name, share in shares.items():
            level = share.mean(0, keepdim=True)
            without[name], _ = self._scored(whole - share + level)
        importance = {party.name: self._importance(party) for party in self.parties}
        return Measured(
            accuracy,
            loss,
            without,
            importance,
            self.traffic,
            self.guard.messages,
            self.skipped,
        )

    def _importance(self, party: Party) -> float | None:
        if party.name in self.server.weights:
            return float(torch.linalg.vector_norm(self.server.weights[party.name]))
        if self.guard.section.clip is not None:
            return None
        return party.norm()

    # ----------------------------------------------------------------- checkpoints
    def _save(self, epoch: int) -> None:
        counts = {
            "up": self.traffic.up,
            "down": self.traffic.down,
            "messages": self.guard.messages,
            "skipped": self.skipped,
        }
        state = {"server": self.server.state(), "counts": counts}
        stores = {party.name: party.store() for party in self.parties}
        self.checkpoints.save(epoch, state, stores)

    def _resumed(self) -> int:
        """Go back to the last whole epoch: how many there are."""
        done = 0
        if self.checkpoints.exists():
            done, state, stores = self.checkpoints.load()
            self.server.restore(state["server"])
            counts = state["counts"]
            self.traffic = Traffic(counts["up"], counts["down"])
            self.guard.messages = counts["messages"]
            self.skipped = counts["skipped"]
            for party in self.parties:
                party.restore(stores[party.name])
        for name in (METRICS, EVENTS):
            lines.truncate_after(self.folder / name, done)
        return done
