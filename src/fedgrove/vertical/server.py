"""The server's half: the labels, the multipliers, and with VIM and split learning the output weights.

One class for each method, with the same four members. Shapes: n entities, b of a batch, c classes,
h a party's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.tree import Tree
from fedgrove.vertical import admm
from fedgrove.vertical.messages import Answer, Message
from fedgrove.vertical.party import Effort

Messages = Mapping[str, Message]


class Server(ABC):
    """Has the labels [n] of all entities; ``widths``: h of each party."""

    #: whether the parties own their output weights
    theirs = False

    def __init__(
        self,
        labels: Int[Tensor, " n"],
        classes: int,
        widths: Mapping[str, int],
        effort: Effort,
    ):
        self.labels = labels
        self.classes = classes
        self.effort = effort
        self.weights: dict[str, Tensor] = {}
        if not self.theirs:
            for name, width in widths.items():
                self.weights[name] = torch.zeros(width, classes, dtype=torch.float64)

    @abstractmethod
    def answers(self, rows: Sequence[int], messages: Messages) -> dict[str, Answer]:
        """What each party is to do, and the server's own step, after a batch's messages."""

    def shares(self, messages: Messages) -> dict[str, Float[Tensor, "b c"]]:
        """Each party's part of the logits, float64."""
        found = {}
        for name, message in messages.items():
            rows = message.rows.double()
            if name in self.weights:
                rows = rows @ self.weights[name]
            found[name] = rows
        return found

    def state(self) -> Tree:
        """For its checkpoint."""
        return {"weights": dict(self.weights)}

    def restore(self, state: Tree) -> None:
        """Go on from a checkpoint."""
        self.weights = dict(state["weights"])

    def _move(self, name: str, slope: Float[Tensor, "h c"]) -> None:
        """One SGD step of a party's output weights."""
        weight = self.weights[name]
        self.weights[name] = weight - self.effort.head_lr * (slope + self.effort.decay * weight)


class Vim(Server):
    """VIM: ADMM over messages of embeddings."""

    def __init__(
        self,
        labels: Int[Tensor, " n"],
        classes: int,
        widths: Mapping[str, int],
        effort: Effort,
    ):
        super().__init__(labels, classes, widths, effort)
        self.duals = torch.zeros(len(labels), classes, dtype=torch.float64)

    def answers(self, rows: Sequence[int], messages: Messages) -> dict[str, Answer]:
        """As in Server: z, the multipliers, one step of each W_k."""
        rho = self.effort.rho
        places = list(rows)
        shares = self.shares(messages)
        sums = torch.stack(list(shares.values())).sum(0)
        before = self.duals[places]
        z = admm.nearest(sums, before, self.labels[places], rho)
        duals = admm.next_duals(before, sums, z, rho)
        self.duals[places] = duals
        found = {}
        for name, message in messages.items():
            h = message.rows.double()
            if not self.theirs:
                slope = h.T @ (duals + rho * (sums - z)) / len(places)
                self._move(name, slope)
            rest = sums - shares[name] - z
            found[name] = self._answer(name, duals, rest, message)
        return found

    def _answer(
        self,
        name: str,
        duals: Float[Tensor, "b c"],
        rest: Float[Tensor, "b c"],
        message: Message,
    ) -> Answer:
        dtype = message.rows.dtype
        weight = None
        if not self.theirs:
            weight = self.weights[name].to(dtype)
        return Answer(duals.to(dtype), rest.to(dtype), weight)

    def state(self) -> Tree:
        """As in Server."""
        return {**super().state(), "duals": self.duals}

    def restore(self, state: Tree) -> None:
        """As in Server."""
        super().restore(state)
        self.duals = state["duals"].clone()


class VimJ(Vim):
    """VIM-J: each party owns its output weights, and sends its share of the logits."""

    theirs = True


class Split(Server):
    """Split learning: the gradient of the loss in each party's message goes back to it."""

    def answers(self, rows: Sequence[int], messages: Messages) -> dict[str, Answer]:
        """As in Server."""
        places = list(rows)
        sums = torch.stack(list(self.shares(messages).values())).sum(0)
        wanted = F.one_hot(self.labels[places], self.classes)
        residual = sums.softmax(-1) - wanted
        found = {}
        for name, message in messages.items():
            h = message.rows.double()
            back = residual @ self.weights[name].T
            found[name] = Answer(back.to(message.rows.dtype))
            self._move(name, h.T @ residual / len(places))
        return found


SERVERS: dict[str, type[Server]] = {"vim": Vim, "vim-j": VimJ, "split": Split}
