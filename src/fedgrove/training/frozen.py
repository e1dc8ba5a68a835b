"""The base's own weights at its sites, for terms whose forward needs them (DoRA)."""

from __future__ import annotations

from torch import Tensor

from fedgrove.adapters.adapter import Site
from fedgrove.adapters.magnitude import Frozen, row_norms
from fedgrove.interop.models import Base


class FrozenLayers:
    """A base's layers. What does not change is worked out once; a weight in another precision than
    the adapters' is converted anew each time, so that it is not in memory twice.
    """

    def __init__(self, base: Base):
        self.base = base
        self._norms: dict[str, Tensor] = {}

    def at(self, site: Site) -> Frozen:
        """The layer at a site."""
        layer = self.base.model.get_submodule(site.name)
        dtype = self.base.adapter_dtype
        weight: Tensor = layer.weight.detach().to(dtype)
        if site.transposed:
            weight = weight.T
        if site.name not in self._norms:
            self._norms[site.name] = row_norms(weight)
        bias = layer.bias
        if bias is not None:
            bias = bias.detach().to(dtype)
        return Frozen(weight, self._norms[site.name], bias)

    def norms(self) -> dict[str, Tensor]:
        """The norms of the rows of every weight, [out] by site, on the CPU."""
        return {name: self.at(site).norms.cpu() for name, site in self.base.sites.items()}
