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
        return [name for name in self.names if not name.startswith(f"{HEAD}/")]

    @property
    def in_head(self) -> list[str]:
        """Those of our own head file."""
        return [name for name in self.names if name.startswith(f"{HEAD}/")]


def common(sources: Sequence[Source], *, leave: bool = False) -> Common:
    """The saved tensors that all clients have in one shape; none of them with ``leave``."""
    everything = sorted({name for source in sources for name in source.others})
    if not everything:
        return Common()
    if leave:
        return Common(notes=("Heads and other saved modules were left out, as asked for.",))
    classes = {tuple(source.card().get("labels") or ()) for source in sources} - {()}
    if len(classes) > 1:
        orders = " and ".join(", ".join(map(str, each)) for each in sorted(classes)[:2])
        return Common(
            notes=(f"Heads were left out, because the clients' classes differ: {orders}.",)
        )
    fits = [name for name in everything if _in_one_shape(sources, name)]
    rest = [name.removeprefix(f"{HEAD}/") for name in everything if name not in fits]
    notes = []
    if fits:
        what = ", ".join(name.removeprefix(f"{HEAD}/") for name in fits[:4])
        notes.append(f"Averaged beside the adapters: {what}{', ...' if fits[4:] else ''}.")
    if rest:
        notes.append(
            f"Left out, because not every client has it in one shape: {', '.join(rest[:4])}"
            f"{', ...' if rest[4:] else ''}."
        )
    return Common(tuple(fits), tuple(notes), _modules(sources, fits))


def mean(sources: Sequence[Source], name: str, weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean of one saved tensor, float64, in its own shape."""
    total = weights[0] * sources[0].saved(name)
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        total += weight * source.saved(name)
    return total


def _in_one_shape(sources: Sequence[Source], name: str) -> bool:
    shapes = {source.others[name].shape for source in sources if name in source.others}
    return len(shapes) == 1 and all(name in source.others for source in sources)


def _modules(sources: Sequence[Source], names: Sequence[str]) -> tuple[str, ...]:
    """The modules to save of which a tensor is averaged, as the clients' configurations say."""
    wanted: Mapping[str, object] = sources[0].config
    found = wanted.get("modules_to_save") or ()
    if not isinstance(found, list | tuple):
        return ()
    kept = [str(module) for module in found if any(f".{module}." in f".{name}" for name in names)]
    return tuple(kept)
