"""The resident frozen base under forward hooks: what runs on it in the pass in progress.

The base is never copied and never changes. Hooks on its sites add what the running assembly (or
cohort) computes; autograd stops below the lowest adapted site because nothing there has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.assembly import Assembly
from fedgrove.adapters.private import unseal
from fedgrove.interop.models import Base, first_position
from fedgrove.interop.quantise import foldable
from fedgrove.training import packed
from fedgrove.training.live import Outputs, Running
from fedgrove.training.rows import rows_first

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch

_SHORT = 256  # tokens; beyond that the attention matrices of plain attention cost too much memory


class HookedBase:
    """One base and its hooks. Not reentrant: one pass at a time."""

    def __init__(self, base: Base, *, packs: bool = True):
        self.base = base
        #: whether batches run without their padding where that can be
        self.packs = packs and packed.packs(base.model)
        #: whether a batch may hold several clients' rows
        self.joins = rows_first(base)
        self._running: Running | None = None
        self._layout: packed.Layout | None = None
        self._attention = base.model.config._attn_implementation
        modules = dict(base.model.named_modules())
        self._hooks = []
        for name, site in base.sites.items():
            hook = partial(self._add, site)
            handle = modules[name].register_forward_hook(hook)
            self._hooks.append(handle)

    def close(self) -> None:
        """Take the hooks off the base."""
        for hook in self._hooks:
            hook.remove()

    def _add(
        self,
        site: Site,
        module: nn.Module,
        args: tuple[Tensor, ...],
        output: Outputs,
    ) -> Outputs | None:
        """The hook on a site, whose input is ``args[0]`` [..., in]."""
        if self._running is None:
            return None
        return self._running.add(site, args[0], output)

    # -------------------------------------------------------------------- contexts
    @contextmanager
    def changed(self, assembly: Assembly) -> Iterator[None]:
        """Inside, the base has the assembly's folded updates in its weights and lacks the layers
        that it leaves out; afterwards it is as it was, whatever happened.
        """
        with ExitStack() as stack:
            stack.callback(self._attend_with, self._attention)
            if assembly.folded:
                stack.enter_context(folded(self.base, assembly.folded))
            if assembly.layers is not None:
                stack.enter_context(without_layers(self.base, assembly.layers))
            yield

    @contextmanager
    def running(self, batch: Batch, what: Running | None = None) -> Iterator[None]:
        """Inside, passes over the base are about this batch, with ``what`` added, forward and
        backward.
        """
        layout = None
        if self.packs and (what is None or what.packs):
            layout = packed.Layout.of(batch["attention_mask"])
        if layout is None:
            self._attend_with(self._padded_attention(batch))
        else:
            self._attend_with(packed.NAME)
        if what is not None:
            what.enter(layout)
        self._running = what
        self._layout = layout
        try:
            yield
        finally:
            self._running = None
            self._layout = None

    @contextmanager
    def instead(self, what: Running | None) -> Iterator[None]:
        """Inside a running batch: ``what`` alone is added to the base, or nothing."""
        running = self._running
        self._running = what
        try:
            yield
        finally:
            self._running = running

    # -------------------------------------------------------------------- passes
    def inputs(self, plain: Mapping[str, Tensor]) -> dict[str, object]:
        """The model's arguments for the running batch, whose plain inputs [b, ...] these are."""
        if self._layout is None:
            return dict(plain)
        first = first_position(self.base.model.config)
        return self._layout.inputs(dict(plain), first)

    def states(self, encoder: nn.Module, plain: Mapping[str, Tensor]) -> Float[Tensor, "b *t h"]:
        """The encoder's last hidden states, in the adapters' precision, zeros where there is
        padding.
        """
        inputs = self.inputs(plain)
        hidden = encoder(**inputs).last_hidden_state
        if self._layout is not None:
            hidden = self._layout.unpack(hidden)
        return hidden.to(self.base.adapter_dtype)

    def places(self, positions: Bool[Tensor, "b t"]) -> Bool[Tensor, "_ _"]:
        """Marks of a padded batch's tokens [b, t] as marks of what runs, packed [1, n]."""
        if self._layout is None:
            return positions
        return self._layout.pack(positions)

    # ------------------------------------------------------------------ attention
    def _attend_with(self, name: str) -> None:
        """Have the model attend by this function; it walks through all modules, so only where it
        changes.
        """
        model = self.base.model
        if model.config._attn_implementation != name:
            model.set_attn_implementation(name)

    def _padded_attention(self, batch: Batch) -> str:
        """Plain attention for training in bfloat16 on a CPU, where the fused one's backward pass is
        five times slower; else the model's own choice, so that logits are those that a user gets
        with default settings.
        """
        slow = (
            self._attention == "sdpa"
            and self.base.device.type == "cpu"
            and self.base.dtype == torch.bfloat16
            and torch.is_grad_enabled()
        )
        tokens = 0  # of images a few hundred at most
        if "input_ids" in batch:
            tokens = batch["input_ids"].shape[1]
        if slow and tokens <= _SHORT:
            return "eager"
        return self._attention


@contextmanager
def folded(base: Base, updates: Mapping[str, Factors]) -> Iterator[None]:
    """Inside, the base's weights have these updates added to them."""
    before: dict[str, Tensor] = {}

    def placed(value: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return unseal(value).to(base.device, base.adapter_dtype)

    try:
        for name, factors in updates.items():
            linear = base.model.get_submodule(name)
            foldable(name, linear)
            weight = linear.weight.data
            before[name] = weight
            update = factors.map(placed).product()
            if base.sites[name].transposed:
                update = update.T
            whole = weight.to(update.dtype) + update
            linear.weight.data = whole.to(weight.dtype)
        yield
    finally:
        for name, weight in before.items():
            linear = base.model.get_submodule(name)
            linear.weight.data = weight


@contextmanager
def without_layers(base: Base, kept: frozenset[int]) -> Iterator[None]:
    """Inside, only the ``kept`` transformer layers run; through the others hidden states pass."""
    before: dict[str, nn.Module] = {}
    try:
        for number, name in layer_names(base).items():
            if number not in kept:
                layer = base.model.get_submodule(name)
                before[name] = layer
                base.model.set_submodule(name, LeftOut(layer))
        yield
    finally:
        for name, layer in before.items():
            base.model.set_submodule(name, layer)


class LeftOut(nn.Module):
    """Stands where a layer stood: its input passes through. What a model asks its layers (their
    kind of attention) it answers as the layer would.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # no part of the model

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__["layer"]
        return getattr(layer, name)

    def forward(
        self, hidden_states: Float[Tensor, "b t h"], *args: object, **others: object
    ) -> Float[Tensor, "b t h"]:
        return hidden_states


def layer_names(base: Base) -> dict[int, str]:
    """The module name of each numbered layer that holds a site, by layer index."""
    found: dict[int, str] = {}
    for name, site in base.sites.items():
        parts = name.split(".")
        for index, part in enumerate(parts):
            if part.isdigit():  # the first number is the layer's
                found[site.layer] = ".".join(parts[: index + 1])
                break
    return found
