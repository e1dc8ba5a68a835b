"""What adapter directories hold beside LoRA factors: heads and other modules to save.

Where all clients have such a tensor in one shape, every output gets its mean, so that the Auto
class of the task loads the result; what only some have, or in other shapes, is left out and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedgrove.aggregate.inputs import Source
from fedgrove.interop.peft import HEAD


@dataclass(frozen=True)
class Common:
    """What is averaged, by name, and what is not, in a sentence each."""

    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    modules: tuple[str, ...] = field(default=())  # PEFT's modules_to_save that are averaged whole

    @property
    def in_adapter(self) -> list[str]:
        """Those that stand in PEFT's own file."""
        return [name for name in self.names if not _of_head(name)]

    @property
    def in_head(self) -> list[str]:
        """Those of our own head file."""
        return [name for name in self.names if _of_head(name)]


def common(sources: Sequence[Source], *, leave: bool = False) -> Common:
    """The saved tensors that all clients have in one shape; none of them with ``leave``."""
    everything: set[str] = set()
    for source in sources:
        everything.update(source.others)
    if not everything:
        return Common()
    if leave:
        return Common(notes=("Heads and other saved modules were left out, as asked for.",))
    classes = {source.classes() for source in sources} - {()}
    if len(classes) > 1:
        orders = " and ".join(", ".join(map(str, each)) for each in sorted(classes)[:2])
        return Common(
            notes=(f"Heads were left out, because the clients' classes differ: {orders}.",)
        )
    fits = []
    rest = []
    for name in sorted(everything):
        if _in_one_shape(sources, name):
            fits.append(name)
        else:
            rest.append(name.removeprefix(f"{HEAD}/"))
    notes = []
    if fits:
        notes.append(f"Averaged beside the adapters: {_listed(fits)}.")
    if rest:
        notes.append(f"Left out, because not every client has it in one shape: {_listed(rest)}.")
    return Common(tuple(fits), tuple(notes), _modules(sources, fits))


def _of_head(name: str) -> bool:
    """Whether a tensor is of our own head file."""
    return name.startswith(f"{HEAD}/")


def _listed(names: Sequence[str]) -> str:
    """The first four of the names, for people."""
    words = [name.removeprefix(f"{HEAD}/") for name in names[:4]]
    if len(names) > 4:
        words.append("...")
    return ", ".join(words)


def mean(
    sources: Sequence[Source],
    name: str,
    weights: Sequence[float],
) -> torch.Tensor:
    """The weighted mean of one saved tensor [any shape, one for all], float64."""
    pairs = list(zip(sources, weights, strict=True))
    first, weight = pairs[0]
    total = weight * first.saved(name)
    for source, weight in pairs[1:]:
        total += weight * source.saved(name)
    return total


def _in_one_shape(sources: Sequence[Source], name: str) -> bool:
    shapes = set()
    for source in sources:
        if name not in source.others:
            return False
        shapes.add(source.others[name].shape)
    return len(shapes) == 1


def _modules(sources: Sequence[Source], names: Sequence[str]) -> tuple[str, ...]:
    """The modules to save of which a tensor is averaged, as the clients' configurations say."""
    wanted: Mapping[str, object] = sources[0].config
    found = wanted.get("modules_to_save") or ()
    if not isinstance(found, list | tuple):
        return ()
    kept = []
    for module in found:
        part = f".{module}."
        if any(part in f".{name}" for name in names):
            kept.append(str(module))
    return tuple(kept)
