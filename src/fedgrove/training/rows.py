"""Whether a base keeps the rows of a batch apart where its adapted layers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedgrove.interop.models import Base

_ROWS, _TOKENS = 3, 8


@torch.no_grad()
def rows_first(base: Base) -> bool:
    """Whether each adapted layer is given ``[rows, tokens, in]``: tried on a small batch of texts.

    Some models put tokens first (Longformer), or all tokens of a batch in one row (routers of
    experts); there a cohort cannot tell whose a token is. True where no such batch can be tried, as
    of images.
    """
    words = getattr(base.model.config, "vocab_size", None)
    if not isinstance(words, int):
        return True
    shapes: list[torch.Size] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        """[any shape] of a layer's input."""
        shapes.append(args[0].shape)

    hooks = [base.model.get_submodule(name).register_forward_pre_hook(note) for name in base.sites]
    ids = torch.arange(_ROWS * _TOKENS, device=base.device).view(_ROWS, _TOKENS) % words
    try:
        base.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return True
    finally:
        for hook in hooks:
            hook.remove()
    return all(len(shape) == 3 and shape[0] == _ROWS for shape in shapes)
