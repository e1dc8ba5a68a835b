"""Who runs for whom in a pass: the weights that a mix gave each term, by layer and example."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Tally:
    """Means over a batch's tokens and sites. Shapes: b examples, t tokens, n terms."""

    def __init__(self, examples: int, mask: Bool[Tensor, "b t"] | None):
        """``mask`` [b, t]: the tokens that are no padding; None where there is none."""
        self.examples, self.mask = examples, mask
        self._sums: dict[int, Float[Tensor, "b n"]] = {}  # by layer
        self._sites: dict[int, int] = {}

    def note(self, layer: int, weights: Float[Tensor, "b n"]) -> None:
        """A site's weights for each example."""
        self._sums[layer] = self._sums.get(layer, torch.zeros_like(weights)) + weights.detach()
        self._sites[layer] = self._sites.get(layer, 0) + 1

    def note_tokens(self, layer: int, weights: Float[Tensor, "tokens n"]) -> None:
        """A site's weights for each token, all examples in one line; padding does not count. What a
        text goes on with is not the batch that was asked about, and is left out.
        """
        each = weights.view(self.examples, -1, weights.shape[-1])
        if self.mask is None:
            self.note(layer, each.mean(1))
        elif each.shape[1] == self.mask.shape[1]:
            counts = self.mask[..., None].to(each.dtype)
            self.note(layer, (each * counts).sum(1) / counts.sum(1).clamp(min=1))

    def shares(self) -> Float[Tensor, "b n"]:
        """Each example's mean weights over all sites."""
        total = torch.stack(list(self._sums.values())).sum(0)
        return total / sum(self._sites.values())

    def by_layer(self) -> dict[int, Float[Tensor, "b n"]]:
        """Each layer's mean over its sites, shallow to deep."""
        return {layer: self._sums[layer] / self._sites[layer] for layer in sorted(self._sums)}
