"""What travels between a party and the server, and what became of it.

A message up is a matrix with a row for each entity of a batch: a party's embedding, or with VIM-J its
share of the logits. Nothing else of a party travels: its own tensors are sealed (``adapters.private``),
and the encoding refuses sealed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.tree import nbytes, pack, typed, unpack
from fedgrove.ground.plain import Plain


@dataclass(frozen=True, eq=False)
class Message:
    """Up: b entities, h numbers of each."""

    rows: Tensor  # [b, h]


@dataclass(frozen=True, eq=False)
class Answer:
    """Down: what a party is to lower, see ``admm.objective``. c numbers of each entity: classes, or of
    split learning the party's own h, whose ``dual`` is then the gradient of its message.
    """

    dual: Tensor  # [b, c]
    rest: Tensor | None = None  # [b, c]; none of split learning
    weight: Tensor | None = None  # [h, c], where the server owns the output weights


@dataclass
class Traffic:
    """Bytes of tensors, all parties together."""

    up: int = 0
    down: int = 0

    def plain(self) -> Plain:
        return {"bytes_up": self.up, "bytes_down": self.down}


def carried_up(message: Message, traffic: Traffic) -> Message:
    """The message as the server gets it: encoded and decoded."""
    traffic.up += nbytes(message)
    return typed(Message, unpack(pack(message)))


def carried_down(answer: Answer, traffic: Traffic) -> Answer:
    """The answer as the party gets it."""
    traffic.down += nbytes(answer)
    return typed(Answer, unpack(pack(answer)))


def finite(tensor: Float[Tensor, "*any"]) -> bool:
    return bool(torch.isfinite(tensor).all())
