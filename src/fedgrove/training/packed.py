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
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from fedgrove.interop.models import first_position

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

#: In attention: a packed row, and the texts and the mask of one group of them.
Heads = Float[Tensor, "1 heads n d"]
Texts = Float[Tensor, "rows heads _ d"]
Mask = Float[Tensor, "rows 1 _ longest"]


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
    def shape(self) -> tuple[int, int]:
        """(texts, slots of each)."""
        return len(self.lengths), self.longest

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
        if min(row) in (0, longest):
            return None
        if not _padded_on_the_right(mask, lengths):
            return None
        groups, starts = _grouped(row)
        real = sum(row)
        spare = _spare(real)
        last = groups[-1].stop
        runs = []
        for start, length in zip(starts, row, strict=True):
            stop = start + length
            runs.append(torch.arange(start, stop))
        of_no_text = torch.full((spare,), last)
        places = torch.cat([*runs, of_no_text])
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
        flat = padded.flatten(0, 1)
        tokens = flat.index_select(0, self.slots)
        zeros = tokens.new_zeros(self.spare, *tokens.shape[1:])
        row = torch.cat([tokens, zeros])
        return row[None]

    def unpack(self, packed: Shaped[Tensor, "1 n *rest"]) -> Shaped[Tensor, "b t *rest"]:
        """[1, n, ...] -> [b, t, ...]: the padded batch again, zeros where there is padding."""
        shape = packed.shape[2:]
        row = packed.squeeze(0)
        real = row[: len(self.slots)]
        texts = len(self.lengths)
        empty = packed.new_zeros(texts * self.longest, *shape)
        padded = empty.index_copy(0, self.slots, real)
        return padded.view(texts, self.longest, *shape)

    def apart(self, packed: Heads) -> list[Texts]:
        """For each group [rows, heads, longest, d], anything finite where there is padding."""
        row = packed.squeeze(0).transpose(0, 1)
        placed = _Moved.apply(row, self.tokens, self.places)
        sizes = [group.stop - group.start for group in self.groups]
        *parts, _ = placed.split([*sizes, 1])
        found = []
        for group, part in zip(self.groups, parts, strict=True):
            texts = part.unflatten(0, group.shape)
            found.append(texts.transpose(1, 2))
        return found

    @property
    def used(self) -> bool:
        """Whether some layer attended by this layout."""
        return bool(self._masks)

    def masks(
        self,
        causal: bool,
        like: Heads,
    ) -> list[Mask | None]:
        """For each group what is added to its scores, the same in every layer."""
        if causal not in self._masks:
            made = [_mask(group, causal, like) for group in self.groups]
            self._masks[causal] = made
        return self._masks[causal]

    def join(self, parts: Sequence[Texts]) -> Float[Tensor, "1 n heads d"]:
        """The groups' tokens in the row's order."""
        _, heads, _, d = parts[0].shape
        last = parts[0].new_zeros(1, heads, d)
        rows = []
        for part in parts:
            texts = part.transpose(1, 2)
            rows.append(texts.flatten(0, 1))
        placed = torch.cat([*rows, last])
        row = _Moved.apply(placed, self.places, self.tokens)
        return row[None]

    def inputs(self, batch: Batch, first: int) -> dict[str, object]:
        """The model's arguments for the packed row; ``first`` is its first position."""
        runs = [torch.arange(length) for length in self.lengths]
        of_no_text = torch.zeros(self.spare, dtype=torch.long)
        positions = torch.cat([*runs, of_no_text]).to(self.slots.device)
        found: dict[str, object] = {
            "input_ids": self.pack(batch["input_ids"]),
            "position_ids": positions[None] + first,
            LAYOUT: self,
        }
        if "token_type_ids" in batch:  # which of two texts a token is of
            found["token_type_ids"] = self.pack(batch["token_type_ids"])
        return found


class _Context(FunctionCtx):
    """What a move keeps for its way back."""

    back: Int[Tensor, " from"]


class _Moved(torch.autograd.Function):
    """Rows in other places. The gradient moves back: one pass each way, for rows that are copied
    get no gradient.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        rows: Float[Tensor, " from *rest"],
        there: Int[Tensor, " to"],
        back: Int[Tensor, " from"],
    ) -> Float[Tensor, " to *rest"]:
        ctx.back = back
        return rows.index_select(0, there)

    @staticmethod
    def backward(
        ctx: _Context,
        *gradients: Float[Tensor, " to *rest"],
    ) -> tuple[Float[Tensor, " from *rest"], None, None]:
        (gradient,) = gradients
        moved = gradient.index_select(0, ctx.back)
        return moved, None, None


def attention(
    module: nn.Module,
    query: Heads,
    key: Float[Tensor, "1 kv n d"],
    value: Float[Tensor, "1 kv n d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Float[Tensor, "1 n heads d"], None]:
    """Attention within each text of the row whose layout is among ``others``."""
    layout = others.pop(LAYOUT, None)
    refused = any(others.get(name) is not None for name in _REFUSED)
    if not isinstance(layout, Layout) or attention_mask is not None or refused:
        raise Unsupported
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # grouped-query attention
        key = key.repeat_interleave(repeats, 1)
        value = value.repeat_interleave(repeats, 1)
    causal = is_causal
    if causal is None:
        causal = bool(getattr(module, "is_causal", False))
    scale = scaling
    if scale is None:
        scale = query.shape[-1] ** -0.5
    groups = zip(
        layout.apart(query),
        layout.apart(key),
        layout.apart(value),
        layout.masks(causal, query),
        strict=True,
    )
    parts = [_attend(q, k, v, mask, scale) for q, k, v, mask in groups]
    return layout.join(parts), None


def _padded_on_the_right(
    mask: Shaped[Tensor, "b t"],
    lengths: Int[Tensor, " b"],
) -> bool:
    """Whether each row is so many ones, and then zeros."""
    places = torch.arange(mask.shape[1], device=mask.device)
    right = places < lengths[:, None]
    same = mask.bool() == right
    return bool(same.all())


def _spare(real: int) -> int:
    """How many tokens of no text, at least one, make so many real ones a round number."""
    unit = _LENGTH
    if real > 8 * _TOKENS:
        unit = _TOKENS
    return unit - real % unit


def _mask(
    group: Group,
    causal: bool,
    like: Heads,
) -> Mask | None:
    """What is added to scores: -inf after a text's end, and after the query's place where attention
    is causal.
    """
    if not causal and min(group.lengths) == group.longest:
        return None
    lengths = torch.tensor(group.lengths, device=like.device)
    place = torch.arange(group.longest, device=like.device)
    inside: Bool[Tensor, "rows longest"] = place < lengths[:, None]
    seen: Bool[Tensor, "rows 1 _ longest"] = inside[:, None, None, :]
    if causal:
        earlier = place <= place[:, None]
        seen = seen & earlier
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
        shares = F.softmax(scores, dim=-1)
        return torch.matmul(shares, v)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        scale=scale,
    )


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
        own = tuple(lengths[index] for index in members)
        longest = math.ceil(own[-1] / _LENGTH) * _LENGTH
        group = Group(own, longest, begin)
        for row, index in enumerate(members):
            starts[index] = begin + row * longest
        groups.append(group)
        begin = group.stop
    return tuple(groups), starts


@torch.no_grad()
def packs(model: PreTrainedModel) -> bool:
    """Whether the model gives the same states for a packed row as for a padded batch: tried on two
    short texts.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    takes = inspect.signature(model.forward).parameters
    if not {"input_ids", "position_ids", "attention_mask"} <= set(takes):
        return False
    ids, mask = _two_texts(model)
    layout = Layout.of(mask)
    assert layout is not None
    inputs = layout.inputs({"input_ids": ids}, first_position(model.config))
    chosen = model.config._attn_implementation
    try:
        padded = model(
            input_ids=ids,
            attention_mask=mask,
            output_hidden_states=False,
        )[0]
        model.set_attn_implementation(NAME)
        packed = model(**inputs)[0]
    except (Unsupported, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return False
    finally:
        model.set_attn_implementation(chosen)
    if not layout.used:  # the model has an attention of its own, which knows no layout
        return False
    found = layout.unpack(packed).float()
    wanted = layout.unpack(layout.pack(padded)).float()
    tolerance = 1e-3
    if padded.dtype in (torch.bfloat16, torch.float16):
        tolerance = 0.05
    error = (found - wanted).norm()
    return bool(error <= tolerance * wanted.norm())


def _two_texts(model: PreTrainedModel) -> tuple[Int[Tensor, "2 8"], Int[Tensor, "2 8"]]:
    """The ids of two texts of eight and five tokens, and their mask."""
    device = next(model.parameters()).device
    words = int(model.config.vocab_size)
    numbers = torch.arange(16, device=device).view(2, 8)
    ids = numbers % max(2, words - 4) + 3
    places = torch.arange(8, device=device)
    lengths = torch.tensor([[8], [5]], device=device)
    mask = places < lengths
    return ids.clamp(max=words - 1), mask.long()
