"""A tree of tensors as one flat vector, and back: what is clipped, summed and masked."""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.tree import leaves, map_tensors
from fedgrove.ground.errors import RunError
from fedgrove.ground.plain import Given

Tree = TypeVar("Tree")


def flat(tree: object) -> Float[Tensor, " numbers"]:
    """Every number of the tree's floating-point tensors, in the tree's order, float64
    ``[numbers]``.
    """
    parts: list[Tensor] = []
    for _, tensor in leaves(tree):
        if tensor.is_floating_point():
            wide = tensor.detach().double()
            parts.append(wide.flatten())
    if parts:
        return torch.cat(parts)
    return torch.zeros(0, dtype=torch.float64)


def restore(tree: Tree, vector: Float[Tensor, " numbers"]) -> Tree:
    """The tree with its floating-point numbers replaced by those of ``vector``, in its own shapes
    and precisions.
    """
    position = 0

    def next_part(tensor: Tensor) -> Tensor:
        """The numbers of the next tensor ``[...]``, in its shape."""
        nonlocal position
        if not tensor.is_floating_point():
            return tensor
        end = position + tensor.numel()
        part = vector[position:end]
        position = end
        return part.reshape(tensor.shape).to(tensor.dtype)

    return map_tensors(tree, next_part)


def difference(
    after: object,
    before: object,
    whose: str,
) -> Float[Tensor, " numbers"]:
    """``flat(after) − flat(before)``. Raises ``RunError`` where the two are not of the same
    shape.
    """
    if _shape(after) != _shape(before):
        raise RunError(
            f"{whose} sends something of another shape than it received, so that the change has no "
            f"norm; "
            "leave [privacy] and [defence] out with this method."
        )
    return flat(after) - flat(before)


def within(most: float) -> float:
    """A norm that is a hair below ``most``, so that no rounding on the way to it exceeds ``most``."""
    return most * (1 - 2.0**-30)


def shortened(vector: Float[Tensor, " numbers"], most: float) -> Float[Tensor, " numbers"]:
    """``[numbers]`` with a Euclidean norm of at most ``most``; the same object where it is short
    enough.
    """
    norm = float(torch.linalg.vector_norm(vector))
    wanted = within(most)
    if norm <= wanted:
        return vector
    return vector * (wanted / norm)


def bounded(
    after: Given,
    before: Given,
    most: float,
    whose: str,
) -> Given:
    """``after`` with its change from ``before`` shortened to the norm ``most``, over all of its
    numbers together.
    """
    change = difference(after, before, whose)
    short = shortened(change, most)
    if short is change:
        return after
    return restore(after, flat(before) + short)


def _shape(tree: object) -> list[tuple[str, torch.Size]]:
    """The path and shape of each floating-point tensor, in the tree's order."""
    shapes: list[tuple[str, torch.Size]] = []
    for path, tensor in leaves(tree):
        if tensor.is_floating_point():
            shapes.append((path, tensor.shape))
    return shapes
