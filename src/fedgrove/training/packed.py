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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from fedgrove.interop.models import first_position

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch

#: the attention function's name in transformers' registry, and the argument of a model's forward
#: that brings it the layout of its row: models hand arguments that they do not know down to it
NAME = "fedgrove_packed"
LAYOUT = "packed_layout"
# texts of similar length in one product; measured: fewer cost more in calls than they save in
# padding
_ROWS = 8
# A CPU's matrix library makes a kernel for each new shape, which takes ten times as long as running
# it: shapes repeat.
_TOKENS, _LENGTH = 64, 8
#: what attention functions of some models are given that this one does not do
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "attention_bias", "bias_mask")


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
    #: the index in the padded batch, flattened, of each real token
    slots: Int[Tensor, " real"]
    groups: tuple[Group, ...]
    # attention has a row of its own: the padded groups one after the other, and a last place for
    # what is of no text
    #: the place in it of each token
    places: Int[Tensor, " n"]
    #: the token in each of its places; a spare one where a group has padding
    tokens: Int[Tensor, " places"]
    _masks: dict[bool, list[Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Shaped[Tensor, "b t"]) -> Layout | None:
        """The layout of an attention mask [b, t]; None where it is not padding on the right, or where
        there is none at all.
        """
        lengths = mask.sum(1)
        row: list[int] = lengths.tolist()
        longest = mask.shape[1]
        if min(row) == longest or min(row) == 0:
            return None
        right = torch.arange(longest, device=mask.device) < lengths[:, None]
        if not bool((mask.bool() == right).all()):
            return None
        groups, starts = _grouped(row)
        real, last = sum(row), groups[-1].stop
        unit = _LENGTH
        if real > 8 * _TOKENS:
            unit = _TOKENS
        spare = unit - real % unit
        runs = [
            torch.arange(start, start + length) for start, length in zip(starts, row, strict=True)
        ]
        places = torch.cat([*runs, torch.full((spare,), last)])
        tokens = torch.full((last + 1,), real)
        tokens[places[:real]] = torch.arange(real)
        return cls(
            lengths=tuple(row),
            longest=longest,
            spare=spare,
            slots=mask.flatten().nonzero()[:, 0],
            groups=groups,
            places=places.to(mask.device),
            tokens=tokens.to(mask.device),
        )

    def pack(self, padded: Shaped[Tensor, "b t *rest"]) -> Shaped[Tensor, "1 n *rest"]:
        """[b, t, ...] -> [1, n, ...]: the real tokens one after the other, zeros in the spare
        ones.
        """
        tokens = padded.flatten(0, 1).index_select(0, self.slots)
        return torch.cat([tokens, tokens.new_zeros(self.spare, *tokens.shape[1:])])[None]

    def unpack(self, packed: Shaped[Tensor, "1 n *rest"]) -> Shaped[Tensor, "b t *rest"]:
        """[1, n, ...] -> [b, t, ...]: the padded batch again, zeros where there is padding."""
        shape = packed.shape[2:]
        real = packed.squeeze(0)[: len(self.slots)]
        empty = packed.new_zeros(len(self.lengths) * self.longest, *shape)
        padded = empty.index_copy(0, self.slots, real)
        return padded.view(len(self.lengths), self.longest, *shape)

    def apart(self, packed: Float[Tensor, "1 heads n d"]) -> list[Float[Tensor, "rows heads _ d"]]:
        """For each group [rows, heads, longest, d], anything finite where there is padding."""
        placed = _Moved.apply(packed.squeeze(0).transpose(0, 1), self.tokens, self.places)
        sizes = [group.stop - group.start for group in self.groups]
        parts = placed.split([*sizes, 1])[:-1]
        return [
            part.unflatten(0, (len(group.lengths), group.longest)).transpose(1, 2)
            for group, part in zip(self.groups, parts, strict=True)
        ]

    def masks(
        self, causal: bool, like: Float[Tensor, "1 heads n d"]
    ) -> list[Float[Tensor, "rows 1 _ longest"] | None]:
        """For each group what is added to its scores, the same in every layer."""
        if causal not in self._masks:
            self._masks[causal] = [_mask(group, causal, like) for group in self.groups]
        return self._masks[causal]

    def join(
        self, parts: Sequence[Float[Tensor, "rows heads _ d"]]
    ) -> Float[Tensor, "1 n heads d"]:
        """The groups' tokens in the row's order."""
        last = parts[0].new_zeros(1, parts[0].shape[1], parts[0].shape[3])
        rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
        placed = torch.cat([*rows, last])
        return _Moved.apply(placed, self.places, self.tokens)[None]

    def inputs(self, batch: Batch, first: int) -> dict[str, Any]:
        """The model's arguments for the packed row; ``first`` is its first position."""
        runs = [torch.arange(length) for length in self.lengths]
        places = torch.cat([*runs, torch.zeros(self.spare, dtype=torch.long)])
        return {
            "input_ids": self.pack(batch["input_ids"]),
            "position_ids": places[None].to(self.slots.device) + first,
            LAYOUT: self,
        }


class _Moved(torch.autograd.Function):
    """Rows in other places. The gradient moves back: one pass each way, for rows that are copied
    get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, " from *rest"],
        there: Int[Tensor, " to"],
        back: Int[Tensor, " from"],
    ) -> Float[Tensor, " to *rest"]:
        ctx.back = back
        return rows.index_select(0, there)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Float[Tensor, " to *rest"]
    ) -> tuple[Float[Tensor, " from *rest"], None, None]:
        return gradients[0].index_select(0, ctx.back), None, None


def attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads n d"],
    key: Float[Tensor, "1 kv n d"],
    value: Float[Tensor, "1 kv n d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 n heads d"], None]:
    """Attention within each text of the row whose layout is among ``others``."""
    layout = others.pop(LAYOUT, None)
    refused = any(others.get(name) is not None for name in _REFUSED)
    if layout is None or attention_mask is not None or refused:
        raise Unsupported
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    causal = is_causal
    if causal is None:
        causal = bool(getattr(module, "is_causal", False))
    scale = scaling
    if scale is None:
        scale = query.shape[-1] ** -0.5
    parts = zip(
        layout.apart(query),
        layout.apart(key),
        layout.apart(value),
        layout.masks(causal, query),
        strict=True,
    )
    return layout.join([_attend(q, k, v, mask, scale) for q, k, v, mask in parts]), None


def _mask(
    group: Group, causal: bool, like: Float[Tensor, "1 heads n d"]
) -> Float[Tensor, "rows 1 _ longest"] | None:
    """What is added to scores: -inf after a text's end, and after the query's place where attention
    is causal.
    """
    if not causal and min(group.lengths) == group.longest:
        return None
    lengths = torch.tensor(group.lengths, device=like.device)
    place = torch.arange(group.longest, device=like.device)
    seen: Bool[Tensor, "rows 1 _ longest"] = (place < lengths[:, None])[:, None, None, :]
    if causal:
        seen = seen & (place <= place[:, None])
    nothing = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return nothing.masked_fill_(~seen, float("-inf"))


def _attend(
    q: Float[Tensor, "rows heads t d"],
    k: Float[Tensor, "rows heads t d"],
    v: Float[Tensor, "rows heads t d"],
    mask: Float[Tensor, "rows 1 _ t"] | None,
    scale: float,
) -> Float[Tensor, "rows heads t d"]:
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
    begin = 0
    for first in range(0, len(order), rows):
        members = order[first : first + rows]
        longest = math.ceil(lengths[members[-1]] / _LENGTH) * _LENGTH
        group = Group(tuple(lengths[index] for index in members), longest, begin)
        for row, index in enumerate(members):
            starts[index] = begin + row * longest
        groups.append(group)
        begin = group.stop
    return tuple(groups), starts


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether the model gives the same states for a packed row as for a padded batch: tried on two
    short texts.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    takes = inspect.signature(model.forward).parameters
    if not {"input_ids", "position_ids", "attention_mask"} <= set(takes):
        return False
    device = next(model.parameters()).device
    words = int(model.config.vocab_size)
    ids = torch.arange(16, device=device).view(2, 8) % max(2, words - 4) + 3
    ids = ids.clamp(max=words - 1)
    mask = (torch.arange(8, device=device) < torch.tensor([[8], [5]], device=device)).long()
    layout = Layout.of(mask)
    assert layout is not None
    inputs = layout.inputs({"input_ids": ids}, first_position(model.config))
    chosen = model.config._attn_implementation
    try:
        padded = model(input_ids=ids, attention_mask=mask, output_hidden_states=False)[0]
        model.set_attn_implementation(NAME)
        packed = model(**inputs)[0]
    except (Unsupported, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return False
    finally:
        model.set_attn_implementation(chosen)
    found, wanted = layout.unpack(packed).float(), layout.unpack(layout.pack(padded)).float()
    tolerance = 1e-3
    if padded.dtype in (torch.bfloat16, torch.float16):
        tolerance = 0.05
    return bool((found - wanted).norm() <= tolerance * wanted.norm())
