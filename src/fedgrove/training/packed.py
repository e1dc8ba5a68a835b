"""Batches without padding: all texts of a batch one after the other, each attending to itself
alone.

Everything in a transformer but attention treats each token alone, so a batch of texts of mixed
length ``[b, t]`` can run as one row of its real tokens ``[1, n]``; only attention needs to know
where a text begins. transformers lets a model run with an attention function of our own, which
takes the row apart and puts it together again: texts of similar length next to each other, so that
attention has little padding either. Padding is often 40 % and more of a batch of 8, and of the
squares that attention works on far more. The results are those of the padded batch up to rounding.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch

NAME = "fedgrove_packed"
# texts of similar length in one product; measured: fewer cost more in calls than they save in
# padding
_ROWS = 8
# A CPU's matrix library makes a kernel for each new shape, which takes ten times as long as running
# it: shapes repeat.
_TOKENS, _LENGTH = 64, 8
#: what attention functions of some models are given that this one does not do
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "attention_bias", "bias_mask")
#: models whose positions start after the padding token's own
_SHIFTED = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "roberta-prelayernorm",
)


class Unsupported(Exception):
    """The model's attention does something that a packed row cannot express."""


@dataclass(frozen=True)
class Group:
    """Texts of similar length in attention: ``rows`` of them, padded to ``longest``; slots
    ``start`` to ``stop``.
    """

    lengths: tuple[int, ...]
    longest: int
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.lengths) * self.longest


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the real tokens of a batch ``[b, t]``, padded on the right, stand in its packed row
    ``[1, n]``.

    The row ends with ``spare`` tokens of no text, at least one, so that its length is a round
    number. What they become goes nowhere, and no gradient comes back to them.
    """

    lengths: tuple[int, ...]
    longest: int
    spare: int
    slots: Tensor  # [n - spare]: the index in the padded batch, flattened, of each token
    groups: tuple[Group, ...]
    # attention has a row of its own: the padded groups one after the other, and a last place for
    # what is of no text
    places: Tensor  # [n]: the place in it of each token
    tokens: (
        Tensor  # [places]: the token in each of its places; a spare one where a group has padding
    )
    _masks: dict[bool, list[Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor) -> Layout | None:
        """The layout of an attention mask; None where it is not padding on the right, or where
        there is none at all.
        """
        lengths = mask.sum(1)
        row: list[int] = lengths.tolist()
        longest = mask.shape[1]
        if min(row) == longest or min(row) == 0:
            return None
        if not bool(
            (mask.bool() == (torch.arange(longest, device=mask.device) < lengths[:, None])).all()
        ):
            return None
        groups, starts = _grouped(row)
        unit = _TOKENS if sum(row) > 8 * _TOKENS else _LENGTH
        spare = unit - sum(row) % unit
        last = groups[-1].stop
        runs = [
            torch.arange(start, start + length) for start, length in zip(starts, row, strict=True)
        ]
        places = torch.cat([*runs, torch.full((spare,), last)])
        tokens = torch.full((last + 1,), sum(row))
        tokens[places[: sum(row)]] = torch.arange(sum(row))
        indices = (
            mask.flatten().nonzero()[:, 0],
            groups,
            places.to(mask.device),
            tokens.to(mask.device),
        )
        return cls(tuple(row), longest, spare, *indices)

    def pack(self, padded: Tensor) -> Tensor:
        """[b, t, ...] -> [1, n, ...], zeros in the spare tokens."""
        tokens = padded.flatten(0, 1).index_select(0, self.slots)
        return torch.cat([tokens, tokens.new_zeros(self.spare, *tokens.shape[1:])])[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, n, ...] -> [b, t, ...], zeros where there is padding."""
        shape = packed.shape[2:]
        real = packed.squeeze(0)[: len(self.slots)]
        padded = packed.new_zeros(len(self.lengths) * self.longest, *shape).index_copy(
            0, self.slots, real
        )
        return padded.view(len(self.lengths), self.longest, *shape)

    def apart(self, packed: Tensor) -> list[Tensor]:
        """[1, heads, n, d] -> for each group [rows, heads, longest, d], anything finite where there
        is padding.
        """
        placed = _Moved.apply(packed.squeeze(0).transpose(0, 1), self.tokens, self.places)
        sizes = [group.stop - group.start for group in self.groups]
        return [
            part.unflatten(0, (len(group.lengths), group.longest)).transpose(1, 2)
            for group, part in zip(self.groups, placed.split([*sizes, 1]), strict=False)
        ]

    def masks(self, causal: bool, like: Tensor) -> list[Tensor | None]:
        """For each group what is added to its scores, the same in every layer."""
        if causal not in self._masks:
            self._masks[causal] = [_mask(group, causal, like) for group in self.groups]
        return self._masks[causal]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """For each group [rows, heads, longest, d] -> [1, n, heads, d]."""
        last = parts[0].new_zeros(1, parts[0].shape[1], parts[0].shape[3])
        placed = torch.cat([*(part.transpose(1, 2).flatten(0, 1) for part in parts), last])
        return _Moved.apply(placed, self.places, self.tokens)[None]

    def inputs(self, batch: Batch, shift: int) -> dict[str, Tensor]:
        """The model's inputs for the packed row."""
        places = torch.cat(
            [*map(torch.arange, self.lengths), torch.zeros(self.spare, dtype=torch.long)]
        )
        return {
            "input_ids": self.pack(batch["input_ids"]),
            "position_ids": places[None].to(self.slots.device) + shift,
        }


class _Moved(torch.autograd.Function):
    """Rows in other places. The gradient moves back: one pass each way, for rows that are copied
    get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.back), None, None


#: thread -> layout of its forward pass in progress; attention functions get no argument of ours
_running: dict[int, Layout] = {}


def _layout() -> Layout | None:
    """The layout of this thread's pass. A GPU's backward pass repeats a forward pass in a thread of
    its own.
    """
    return _running.get(threading.get_ident()) or next(iter(_running.values()), None)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of the running layout. query [1, heads, n, d] -> [1, n, heads,
    d].
    """
    layout = _layout()
    if (
        layout is None
        or attention_mask is not None
        or any(others.get(name) is not None for name in _REFUSED)
    ):
        raise Unsupported
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = zip(layout.apart(query), layout.apart(key), layout.apart(value), strict=True)
    masks = layout.masks(causal, query)
    return layout.join(
        [_attend(q, k, v, mask, scale) for (q, k, v), mask in zip(parts, masks, strict=True)]
    ), None


def _mask(group: Group, causal: bool, like: Tensor) -> Tensor | None:
    """What is added to scores: -inf after a text's end, and after the query's place where attention
    is causal.
    """
    if not causal and min(group.lengths) == group.longest:
        return None
    lengths = torch.tensor(group.lengths, device=like.device)
    place = torch.arange(group.longest, device=like.device)
    seen = (place < lengths[:, None])[:, None, None, :]
    if causal:
        seen = seen & (place <= place[:, None])
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~seen, float("-inf")
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Plain attention for training on a CPU, where the fused one's backward pass is several times
    slower.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled():
        scores = torch.matmul(q * scale, k.transpose(-1, -2))
        if mask is not None:
            scores = scores + mask
        return torch.matmul(F.softmax(scores, dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _grouped(lengths: Sequence[int]) -> tuple[tuple[Group, ...], list[int]]:
    """Texts in groups of similar length; and the slot at which each text begins, in the given
    order.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    rows = max(_ROWS, len(lengths) // _ROWS)
    groups: list[Group] = []
    starts = [0] * len(lengths)
    for first in range(0, len(order), rows):
        members = order[first : first + rows]
        longest = math.ceil(lengths[members[-1]] / _LENGTH) * _LENGTH
        group = Group(tuple(lengths[i] for i in members), longest, groups[-1].stop if groups else 0)
        groups.append(group)
        for row, index in enumerate(members):
            starts[index] = group.start + row * group.longest
    return tuple(groups), starts


@contextmanager
def running(config: Any, layout: Layout) -> Iterator[None]:
    """Inside, the model runs packed rows of this layout, forward and backward."""
    thread, chosen = threading.get_ident(), config._attn_implementation
    _running[thread], config._attn_implementation = layout, NAME
    try:
        yield
    finally:
        del _running[thread]
        config._attn_implementation = chosen


def position_shift(config: Any) -> int:
    """What a model's first position is called."""
    shifted = getattr(config, "model_type", "") in _SHIFTED
    return int(getattr(config, "pad_token_id", None) or 0) + 1 if shifted else 0


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether the model gives the same states for a packed row as for a padded batch: tried on two
    short texts.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    config = model.config
    takes = inspect.signature(model.forward).parameters
    if not {"input_ids", "position_ids", "attention_mask"} <= set(takes):
        return False
    device = next(model.parameters()).device
    ids = torch.arange(16, device=device).view(2, 8) % max(2, int(config.vocab_size) - 4) + 3
    ids = ids.clamp(max=int(config.vocab_size) - 1)
    mask = (torch.arange(8, device=device) < torch.tensor([[8], [5]], device=device)).long()
    layout = Layout.of(mask)
    assert layout is not None
    try:
        padded = model(input_ids=ids, attention_mask=mask, output_hidden_states=False)[0]
        with running(config, layout):
            packed = model(**layout.inputs({"input_ids": ids}, position_shift(config)))[0]
    except (Unsupported, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return False
    found, wanted = layout.unpack(packed).float(), layout.unpack(layout.pack(padded)).float()
    tolerance = 0.05 if padded.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((found - wanted).norm() <= tolerance * wanted.norm())
