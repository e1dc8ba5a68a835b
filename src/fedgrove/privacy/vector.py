"""A tree of tensors as one flat vector, and back: what is clipped, summed and masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedgrove.adapters.tree import leaves, map_tensors
from fedgrove.ground.errors import RunError


def flat(tree: Any) -> Tensor:
    """Every number of the tree's floating-point tensors, in the tree's order, float64
    ``[numbers]``.
    """
    parts = [
        tensor.detach().double().flatten()
        for _, tensor in leaves(tree)
        if tensor.is_floating_point()
    ]
    if parts:
        return torch.cat(parts)
    return torch.zeros(0, dtype=torch.float64)


def restore(tree: Any, vector: Tensor) -> Any:
    """The tree with its floating-point numbers replaced by those of ``vector``, in its own shapes
    and precisions.
    """
    position = 0

    def next_part(tensor: Tensor) -> Tensor:
        nonlocal position
        if not tensor.is_floating_point():
            return tensor
        part = vector[position : position + tensor.numel()]
        position += tensor.numel()
        return part.reshape(tensor.shape).to(tensor.dtype)

    return map_tensors(tree, next_part)


def difference(after: Any, before: Any, whose: str) -> Tensor:
    """``flat(after) − flat(before)``. Raises ``RunError`` where the two are not of the same
    shape.
    """
    if _shape(after) != _shape(before):
        raise RunError(
            f"{whose} sends something of another shape than it received, so that the change has no "
            f"norm; "
            "leave [privacy] out with this method."
        )
    return flat(after) - flat(before)


def within(most: float) -> float:
    """A norm that is a hair below ``most``, so that no rounding on the way to it exceeds ``most``."""
    return most * (1 - 2.0**-30)


def shortened(vector: Tensor, most: float) -> Tensor:
    """``[numbers]`` with a Euclidean norm of at most ``most``; the same object where it is short
    enough.
    """
    norm = float(torch.linalg.vector_norm(vector))
    if norm <= within(most):
        return vector
    return vector * (within(most) / norm)


def bounded(
    after: Mapping[str, Any], before: Mapping[str, Any], most: float, whose: str
) -> Mapping[str, Any]:
    """``after`` with its change from ``before`` shortened to the norm ``most``, over all of its
    numbers together.
    """
    change = difference(after, before, whose)
    short = shortened(change, most)
    if short is change:
        return after
    changed: Mapping[str, Any] = restore(after, flat(before) + short)
    return changed


def _shape(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (path, tuple(tensor.shape)) for path, tensor in leaves(tree) if tensor.is_floating_point()
    ]
