"""``fedgrove aggregate``: one server round over adapter directories that anyone trained with any
tool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgrove.aggregate.grouped import FedTreeLoRA, HiLoRA
from fedgrove.aggregate.inputs import Source, check_alike, open_clients, open_source, sites_of
from fedgrove.aggregate.options import parse_options, parse_weights, unknown_method
from fedgrove.aggregate.progress import Phase, silent
from fedgrove.aggregate.rule import Rule, Task
from fedgrove.aggregate.rules import (
    FedExLoRA,
    FedIT,
    FedPLoRA,
    FedRotLoRA,
    FedSA,
    FedVLM,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HETLoRA,
    LoRAFair,
    RaFLoRA,
)
from fedgrove.aggregate.writer import AdapterWriter, appearing, shared_config, write_json
from fedgrove.ground.errors import AdapterError
from fedgrove.interop.peft import read_json

_KINDS: tuple[type[Rule], ...] = (
    FedIT, FFALoRA, FedSA, FedVLM, FLoRA, FlexLoRA, HETLoRA, FedExLoRA, LoRAFair, FedRotLoRA, FedPLoRA, RaFLoRA,
    FedTreeLoRA, HiLoRA,
)  # fmt: skip
#: The rules by the names of their methods.
RULES: dict[str, type[Rule]] = {kind.name: kind for kind in _KINDS}
GLOBAL, RECORD = "_global", "aggregate.json"


@dataclass(frozen=True)
class Done:
    """What was written: the directory, its adapters by name, and what the user should know."""

    out: Path
    adapters: tuple[str, ...]
    n_agg: float | None
    notes: tuple[str, ...]

    def sentences(self) -> list[str]:
        """What to print."""
        own = len(self.adapters) - (GLOBAL in self.adapters)
        parts = [f"{GLOBAL}/"] * (GLOBAL in self.adapters) + [
            f"an adapter for each of {own} clients"
        ] * bool(own)
        lost = (
            []
            if self.n_agg is None
            else [f"Lost against the mean of the updates (n_agg): {self.n_agg:.4g}."]
        )
        return [*self.notes, *lost, f"Wrote {self.out}: {' and '.join(parts)}."]


def aggregate(
    method: str,
    clients: Sequence[Path],
    out: Path,
    *,
    weights: str | None = None,
    rank: int | None = None,
    previous: Path | None = None,
    options: Sequence[str] = (),
    phase: Phase = silent,
) -> Done:
    """Aggregate PEFT adapter directories by a method's server rule into ``out``, which must not
    exist.

    Args:
        method: a name in ``RULES``. clients: adapter directories; the basename is the client's
            name.
        weights: ``"120,80"`` in that order; None is uniform. rank: of a global adapter that comes
            from an SVD.
        previous: the last round's ``out``. options: ``["K=3", ...]``. phase: opens a progress bar.

    Only one site of all clients is in memory at a time. Raises AdapterError before anything is
    written.
    """
    kind = RULES.get(method)
    if kind is None:
        raise unknown_method(method, list(RULES))
    parsed = parse_options(options, kind.Options, method)
    if out.exists() or out.is_symlink():
        raise AdapterError(
            f"{out} exists already; name another directory with --out, or remove it first."
        )
    if rank is not None and not kind.takes_rank:
        takers = ", ".join(name for name, other in RULES.items() if other.takes_rank)
        raise AdapterError(
            f"--rank has no meaning for {method}; it is the global rank of {takers}."
        )
    if rank is not None and rank < 1:
        raise AdapterError(f"--rank is {rank}; it must be at least 1.")
    numbers = parse_weights(weights, len(clients))
    sources = open_clients(clients)
    if numbers and kind.every_weight and not all(numbers):
        raise AdapterError(
            f"--weights '{weights}': {method} needs weights above 0, since every group needs a "
            f"mean."
        )
    last = _previous(previous, sources[0]) if previous else None
    task = Task(sources, sites_of(sources[0]), numbers, rank, last, _round(previous) + 1, parsed)
    rule = kind(task)
    rule.check()
    tick = phase("Checking adapters", len(sources) + bool(last))
    for source in [*sources, *([last] if last else [])]:
        source.check_values()
        tick()
    if kind.passes > 1:
        rule.prepare(phase("Comparing clients", len(task.sites)))
    with appearing(out) as partial:
        adapters, noise = _write(rule, task, partial, phase("Aggregating sites", len(task.sites)))
        total = (
            None
            if None in noise.values()
            else math.sqrt(math.fsum((value or 0.0) ** 2 for value in noise.values()))
        )
        write_json(
            partial / "noise.json",
            {
                "method": method,
                "n_agg": total,
                "sites": {site: {"n_agg": value} for site, value in noise.items()},
            },
        )
        for name, content in rule.artefacts().items():
            write_json(partial / name, content)
        notes = (*rule.notes, *_notes(rule, task))
        write_json(partial / RECORD, _record(rule, task, notes))
    return Done(out, adapters, total, notes)


def _write(
    rule: Rule, task: Task, folder: Path, advance: Any
) -> tuple[tuple[str, ...], dict[str, float | None]]:
    """Every site of every output; the names of the adapters and the noise by site."""
    config, dtype = shared_config(task.sources), _dtype(task.sources)
    writers: dict[str, AdapterWriter] = {}
    noise: dict[str, float | None] = {}
    for site in task.sites:
        result = rule.site(site, [source.read(site) for source in task.sources])
        parts = {GLOBAL: result.whole} if result.whole is not None else {}
        if result.own is not None:
            parts |= {
                source.name: each for source, each in zip(task.sources, result.own, strict=True)
            }
        for name, factors in parts.items():
            if name not in writers:
                writers[name] = AdapterWriter(folder / name, config, dtype)
            writers[name].add(site, factors)
        noise[site] = result.noise
        advance()
    for writer in writers.values():
        writer.close()
    return tuple(writers), noise


def _previous(folder: Path, first: Source) -> Source:
    """The global adapter of the last round's output; an adapter directory itself will do."""
    inner = folder / GLOBAL
    if not inner.is_dir() and not (folder / "adapter_config.json").exists():
        raise AdapterError(
            f"{folder} has no {GLOBAL}; give --previous the output directory of the last round."
        )
    source = open_source(inner if inner.is_dir() else folder, GLOBAL)
    check_alike(first, source)
    return source


def _round(previous: Path | None) -> int:
    """The number of the last round: 0 without one, and 1 where it is not recorded."""
    if previous is None:
        return 0
    record = previous / RECORD
    number = read_json(record).get("round") if record.exists() else 1
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise AdapterError(
            f"{record}: round is {number!r}; it must be a whole number of at least 1."
        )
    return number


def _dtype(sources: Sequence[Source]) -> Any:
    """float32, or float64 where a client has it: means of half-precision factors are not rounded to
    half precision.
    """
    import torch

    return (
        torch.float64 if any(source.dtype == torch.float64 for source in sources) else torch.float32
    )


def _notes(rule: Rule, task: Task) -> list[str]:
    notes = []
    if task.previous is not None and not rule.takes_previous:
        notes.append(f"{rule.name} does not refer to the last round; --previous was not used.")
    heads = [source.name for source in task.sources if source.has_head]
    if heads:
        who = (
            "every client"
            if len(heads) == len(task.sources)
            else ", ".join(heads[:5]) + ("..." if heads[5:] else "")
        )
        notes.append(
            f"Heads and other saved modules ({who}) were left alone: only LoRA factors are "
            f"aggregated."
        )
    return notes


def _record(rule: Rule, task: Task, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "method": rule.name,
        "round": rule.round,
        "clients": [source.name for source in task.sources],
        "weights": rule.parts,
        "rank": task.rank,
        "options": task.options.model_dump(),
        "notes": list(notes),
    }
