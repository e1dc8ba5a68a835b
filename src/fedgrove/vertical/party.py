"""A party: embeds its own part of the entities, and lowers what the server asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.private import seal, unseal
from fedgrove.adapters.tree import Tree
from fedgrove.vertical import admm
from fedgrove.vertical.messages import Answer, Message

Rows = Sequence[int]  # entities by number


@dataclass(frozen=True)
class Effort:
    """A party's work for one message: ``steps`` of SGD; ``damp`` is the weight of ``admm.damping``."""

    steps: int
    lr: float
    head_lr: float
    decay: float
    rho: float
    damp: float = 0.0


class Party(ABC):
    """Shapes: b entities of a batch, h its width, c classes. What it trains is sealed.

    ``weight`` [h, c] are its own output weights (VIM-J); None where the server owns them, or with
    split learning.
    """

    weight: Tensor | None

    def __init__(self, name: str, effort: Effort):
        self.name = name
        self.effort = effort

    @property
    @abstractmethod
    def width(self) -> int:
        """h."""

    @abstractmethod
    def embed(self, rows: Rows) -> Float[Tensor, "b h"]:
        """What its columns of these entities become."""

    @abstractmethod
    def fit(self, rows: Rows, answer: Answer, *keys: object) -> None:
        """Make its steps on these entities; ``keys`` say which of the run's they are."""

    @abstractmethod
    def store(self) -> Tree:
        """What it trains, for its own checkpoint."""

    @abstractmethod
    def restore(self, store: Tree) -> None:
        """Go on from a checkpoint."""

    def speak(self, rows: Rows) -> Message:
        """Its message about these entities."""
        found = self.embed(rows)
        if self.weight is not None:
            found = found @ unseal(self.weight).to(found.dtype)
        return Message(found)

    def norm(self) -> float | None:
        """``‖W_k‖``, where it owns the output weights: how much the sum listens to it."""
        if self.weight is None:
            return None
        return float(torch.linalg.vector_norm(unseal(self.weight).double()))


def loss(
    share: Float[Tensor, "b c"],
    first: Float[Tensor, "b c"] | None,
    answer: Answer,
    effort: Effort,
) -> Float[Tensor, ""]:
    """What an answer asks a party to lower; ``first``: its share when it was asked."""
    dual = answer.dual.to(share.dtype)
    if answer.rest is None:
        return (dual * share).sum(-1).mean()
    asked = admm.objective(share, dual, answer.rest.to(share.dtype), effort.rho)
    if effort.damp and first is not None:
        asked = asked + admm.damping(share, first, effort.damp)
    return asked


class Columns(Party):
    """Columns of numbers: ``h = ReLU(x V)``, or ``h = x`` where its width is 0.

    Args:
        values: [n, columns], finite.
        train: the entities whose mean and variance scale the columns.
        classes: c, where it owns its output weights; else None.
    """

    def __init__(
        self,
        name: str,
        effort: Effort,
        values: Float[Tensor, "n columns"],
        train: Rows,
        *,
        width: int,
        classes: int | None,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(name, effort)
        known = values[list(train)]
        spread = known.std(0, correction=0)
        self.mean = known.mean(0)
        self.spread = torch.where(
            spread > 0, spread, 1.0
        )  # a column that never varies says nothing
        scaled = (values - self.mean) / self.spread
        one = scaled.new_ones(len(scaled), 1)  # for what there is without any column
        self.x = torch.cat([scaled, one], 1).to(dtype)
        columns = self.x.shape[1]
        self.inner: Tensor | None = None
        if width:
            drawn = torch.randn(columns, width, generator=generator, dtype=torch.float64)
            self.inner = seal((drawn * columns**-0.5).to(dtype))
        self.weight = None
        if classes is not None:
            self.weight = seal(torch.zeros(self.width, classes, dtype=dtype))

    @property
    def width(self) -> int:
        """As in Party."""
        if self.inner is None:
            return self.x.shape[1]
        return self.inner.shape[1]

    def embed(self, rows: Rows) -> Float[Tensor, "b h"]:
        """As in Party."""
        inner = self.inner
        if inner is not None:
            inner = unseal(inner)
        return self._embedded(self.x[list(rows)], inner)

    @staticmethod
    def _embedded(
        x: Float[Tensor, "b columns"], inner: Float[Tensor, "columns h"] | None
    ) -> Float[Tensor, "b h"]:
        if inner is None:
            return x
        return torch.relu(x @ inner)

    def fit(self, rows: Rows, answer: Answer, *keys: object) -> None:
        """As in Party."""
        x = self.x[list(rows)]
        inner = _leaf(self.inner)
        own = _leaf(self.weight)
        weight = own
        if answer.weight is not None:
            weight = answer.weight.to(x.dtype)
        first: Tensor | None = None
        for _ in range(self.effort.steps):
            share = self._embedded(x, inner)
            if weight is not None:
                share = share @ weight
            if first is None:
                first = share.detach()
            self._step(loss(share, first, answer, self.effort), inner, own)
        if inner is not None:
            self.inner = seal(inner)
        if own is not None:
            self.weight = seal(own)

    def _step(
        self,
        lowered: Float[Tensor, ""],
        inner: Float[Tensor, "columns h"] | None,
        own: Float[Tensor, "h c"] | None,
    ) -> None:
        """One step of SGD, in place."""
        pairs = [(inner, self.effort.lr), (own, self.effort.head_lr)]
        leaves = [(leaf, rate) for leaf, rate in pairs if leaf is not None]
        slopes = torch.autograd.grad(lowered, [leaf for leaf, _ in leaves])
        with torch.no_grad():
            for (leaf, rate), slope in zip(leaves, slopes, strict=True):
                leaf -= rate * (slope + self.effort.decay * leaf)

    def store(self) -> Tree:
        """As in Party."""
        return {"inner": self.inner, "weight": self.weight}

    def restore(self, store: Tree) -> None:
        """As in Party."""
        self.inner = store["inner"]
        self.weight = store["weight"]


def _leaf(tensor: Float[Tensor, "rows columns"] | None) -> Float[Tensor, "rows columns"] | None:
    """A copy that trains."""
    if tensor is None:
        return None
    return unseal(tensor).clone().requires_grad_()
