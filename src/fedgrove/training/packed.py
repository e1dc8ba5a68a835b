"""Batches without padding: all texts of a batch one after the other, each attending to itself alone.

Everything in a transformer but attention treats each token alone, so a batch of texts of mixed length ``[b, t]`` can
run as one row of its real tokens ``[1, n]``; only attention needs to know where a text begins. transformers lets a
model run with an attention function of our own, which takes the row apart and puts it together again. Padding is often
40 % and more of a batch of 8. The results are those of the padded batch up to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch

NAME = "fedgrove_packed"
#: what attention functions of some models are given that this one does not do
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "attention_bias", "bias_mask")
#: models whose positions start after the padding token's own
_SHIFTED = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm")


class Unsupported(Exception):
    """The model's attention does something that a packed row cannot express."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the real tokens of a batch ``[b, t]``, padded on the right, stand in its packed row ``[1, n]``."""

    lengths: tuple[int, ...]
    longest: int
    slots: Tensor  # [n]: the index in the padded batch, flattened, of each token

    @classmethod
    def of(cls, mask: Tensor) -> Layout | None:
        """The layout of an attention mask; None where it is not padding on the right, or where there is none at all."""
        lengths = mask.sum(1)
        row: list[int] = lengths.tolist()
        longest = mask.shape[1]
        if min(row) == longest or min(row) == 0:
            return None
        if not bool((mask.bool() == (torch.arange(longest, device=mask.device) < lengths[:, None])).all()):
            return None
        return cls(tuple(row), longest, mask.flatten().nonzero()[:, 0])

    def pack(self, padded: Tensor) -> Tensor:
        """[b, t, ...] -> [1, n, ...]."""
        return padded.flatten(0, 1).index_select(0, self.slots)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, n, ...] -> [b, t, ...], zeros where there is padding."""
        shape = packed.shape[2:]
        padded = packed.new_zeros(len(self.lengths) * self.longest, *shape).index_copy(0, self.slots, packed[0])
        return padded.view(len(self.lengths), self.longest, *shape)

    def inputs(self, batch: Batch, shift: int) -> dict[str, Tensor]:
        """The model's inputs for the packed row."""
        places = torch.cat([torch.arange(length) for length in self.lengths]).to(self.slots.device)
        return {"input_ids": self.pack(batch["input_ids"]), "position_ids": places[None] + shift}


_running: Layout | None = None  # of the forward pass in progress; attention functions get no argument of ours


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
    """Attention within each text of the running layout. query [1, heads, n, d] -> [1, n, heads, d]."""
    layout = _running
    if layout is None or attention_mask is not None or any(others.get(name) is not None for name in _REFUSED):
        raise Unsupported
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (layout.unpack(part.transpose(1, 2)).transpose(1, 2) for part in (query, key, value))
    mixed = _attend(q, k, v, _mask(layout, causal, q), scale)
    return layout.pack(mixed.transpose(1, 2)), None


def _mask(layout: Layout, causal: bool, like: Tensor) -> Tensor:
    """What is added to scores: -inf after a text's end, and after the query's place where attention is causal."""
    lengths = torch.tensor(layout.lengths, device=like.device)
    place = torch.arange(layout.longest, device=like.device)
    seen = (place < lengths[:, None])[:, None, None, :]
    if causal:
        seen = seen & (place <= place[:, None])
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Plain attention for training on a CPU, where the fused one's backward pass is several times slower."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        scores = torch.matmul(q * scale, k.transpose(-1, -2)) + mask
        return torch.matmul(F.softmax(scores, dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@contextmanager
def running(config: Any, layout: Layout) -> Iterator[None]:
    """Inside, the model runs packed rows of this layout, forward and backward."""
    global _running
    before, chosen = _running, config._attn_implementation
    _running, config._attn_implementation = layout, NAME
    try:
        yield
    finally:
        _running, config._attn_implementation = before, chosen


def position_shift(config: Any) -> int:
    """What a model's first position is called."""
    shifted = getattr(config, "model_type", "") in _SHIFTED
    return int(getattr(config, "pad_token_id", None) or 0) + 1 if shifted else 0


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether the model gives the same states for a packed row as for a padded batch: tried on two short texts."""
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
    wanted = layout.pack(padded).float()
    tolerance = 0.05 if padded.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((packed.float() - wanted).norm() <= tolerance * wanted.norm())
