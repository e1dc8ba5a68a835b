"""``fedgrove aggregate``: one server round over adapter directories that anyone trained with any
tool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.algebra import shares
from fedgrove.aggregate import saved as beside
from fedgrove.aggregate.cards import write_cards
from fedgrove.aggregate.directories import Directories
from fedgrove.aggregate.inputs import (
    Source,
    base_of,
    check_alike,
    open_clients,
    open_source,
    sites_of,
)
from fedgrove.aggregate.layers import check_layers
from fedgrove.aggregate.options import (
    Chosen,
    named_rules,
    parse_options,
    parse_weights,
    rule_of,
)
from fedgrove.aggregate.progress import Phase, silent
from fedgrove.aggregate.tags import read_tags
from fedgrove.aggregate.writer import (
    AdapterWriter,
    appearing,
    refuse_existing,
    shared_config,
    write_json,
)
from fedgrove.ground.errors import AdapterError
from fedgrove.interop.peft import HEAD, read_json
from fedgrove.methods.rule import Finds, FirstPass, Needs, OwnWeights, Round, ServerRule, prepared

GLOBAL = "_global"
RECORD = "aggregate.json"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Written:
    """What was written: the directory, its adapters by name, and what the user should know."""

    out: Path
    adapters: tuple[str, ...]
    n_agg: float | None
    notes: tuple[str, ...]

    def sentences(self) -> list[str]:
        """What to print."""
        said = list(self.notes)
        if self.n_agg is not None:
            said.append(f"Lost against the mean of the updates (n_agg): {self.n_agg:.4g}.")
        parts = []
        if GLOBAL in self.adapters:
            parts.append(f"{GLOBAL}/")
        own = len(self.adapters) - len(parts)
        if own:
            parts.append(f"an adapter for each of {own} clients")
        return [*said, f"Wrote {self.out}: {' and '.join(parts)}."]


def aggregate(
    method: str,
    clients: Sequence[Path],
    out: Path,
    *,
    weights: str | None = None,
    rank: int | None = None,
    previous: Path | None = None,
    base: str | None = None,
    options: Sequence[str] = (),
    phase: Phase = silent,
) -> Written:
    """Aggregate PEFT adapter directories by a method's server rule into ``out``, which must not
    exist.

    Args:
        method: one with a rule (``options.rules``), of this package or of any other.
        clients: adapter directories; the basename is the client's name.
        weights: ``"120,80"`` in that order; None is uniform. rank: of a global adapter that comes
            from an SVD.
        previous: the last round's ``out``. base: what the outputs call the base model, where the
            clients call it differently.
        options: ``["K=3", ...]``. phase: opens a progress bar.

    Only one site of all clients is in memory at a time. Raises AdapterError before anything is
    written.
    """
    kind, rule_class = rule_of(method)
    chosen = parse_options(options, kind, rule_class.needs)
    refuse_existing(out)
    _check_rank(rank, method, rule_class.needs)
    directories = _opened(
        method,
        rule_class.needs,
        clients,
        weights,
        rank,
        previous,
        chosen,
        base,
    )
    directories.check()
    _check_values(directories, phase)
    this_round = Round(directories.sites, directories.round, chosen.directories.seed)
    rule = rule_class(chosen.method, this_round)
    used = _compared(rule, directories, phase)
    with appearing(out) as partial:
        tick = phase("Aggregating sites", len(directories.sites))
        leave = chosen.directories.heads == "leave"
        common = beside.common(directories.sources, leave=leave)
        adapters, noise = _write(
            rule,
            directories,
            used,
            partial,
            tick,
            common,
            base,
        )
        total = _total(list(noise.values()))
        sites = {site: {"n_agg": value} for site, value in noise.items()}
        write_json(
            partial / "noise.json",
            {
                "method": method,
                "n_agg": total,
                "sites": sites,
            },
        )
        if isinstance(rule, Finds):
            for name, content in rule.artefacts(directories.names).items():
                write_json(partial / name, content)
        notes = _notes(rule, directories)
        notes += common.notes
        record = {
            "method": method,
            "round": directories.round,
            "clients": directories.names,
            "weights": list(used),
            "rank": rank,
            "options": dict(chosen.record),
            "notes": notes,
        }
        write_json(partial / RECORD, record)
        write_cards(partial, adapters, directories.sources, common, record)
    return Written(out, adapters, total, tuple(notes))


def _opened(
    method: str,
    needs: Needs,
    clients: Sequence[Path],
    weights: str | None,
    rank: int | None,
    previous: Path | None,
    chosen: Chosen,
    base: str | None,
) -> Directories:
    """The clients' directories and the last round's, opened and in agreement."""
    numbers = parse_weights(weights, len(clients))
    sources = open_clients(clients, base=base)
    check_layers(sources[0], base or base_of(sources[0]))
    if numbers and needs.every_weight and not all(numbers):
        raise AdapterError(
            f"--weights '{weights}': {method} needs weights above 0, since every group needs a "
            f"mean."
        )
    last = None
    if previous:
        last = _previous(previous, sources[0], base)
    number = chosen.directories.round or _last_round(previous) + 1
    if needs.rounds and number > 1 and last is None:
        raise AdapterError(
            f"{method} refers to the last global adapter in round {number}: give --previous."
        )
    tags = None
    if needs.by_index == "tagged":
        tags = read_tags(sources, last, method)
    return Directories(
        method,
        needs,
        sources,
        sites_of(sources[0]),
        shares(numbers, len(sources)),
        weighed=numbers is not None,
        round=number,
        rank=rank,
        previous=last,
        fold=chosen.directories.rescale == "B",
        tags=tags,
    )


def _check_values(directories: Directories, phase: Phase) -> None:
    sources = list(directories.sources)
    if directories.previous is not None:
        sources.append(directories.previous)
    tick = phase("Checking adapters", len(sources))
    for source in sources:
        source.check_values()
        tick()


def _compared(rule: ServerRule, directories: Directories, phase: Phase) -> Sequence[float]:
    """All passes but the last; gives the weights that the rule takes."""
    if directories.needs.frozen:
        directories.check_frozen(phase("Comparing clients", len(directories.sites)))
    tick = silent("", 0)
    if isinstance(rule, FirstPass):
        tick = phase("Comparing clients", len(directories.sites))
    arrivals = directories.arrivals(directories.weights)
    return prepared(rule, _counted(arrivals, tick), directories.weights)


def _counted(items: Iterable[Item], tick: Callable[[], None]) -> Iterator[Item]:
    """The same items; ``tick`` is called after each."""
    for item in items:
        yield item
        tick()


def _write(
    rule: ServerRule,
    directories: Directories,
    weights: Sequence[float],
    folder: Path,
    tick: Callable[[], None],
    common: beside.Common,
    base: str | None,
) -> tuple[tuple[str, ...], dict[str, float | None]]:
    """Every site of every output; the names of the adapters and the noise by site."""
    sources = directories.sources
    config = shared_config(sources, common, base)
    dtype = _dtype(sources)
    writers: dict[str, AdapterWriter] = {}
    noise: dict[str, float | None] = {}
    for given in _counted(directories.arrivals(weights), tick):
        outcome = rule.site(given)
        whole, own = directories.adapters(given, outcome)
        parts: dict[str, Factors] = {}
        if whole is not None:
            parts[GLOBAL] = whole
        for source, factors in zip(sources, own, strict=False):  # a rule may give nobody its own
            parts[source.name] = factors
        for name, factors in parts.items():
            if name not in writers:
                writers[name] = AdapterWriter(folder / name, config, dtype)
            writer = writers[name]
            writer.add(given.name, factors)
        noise[given.name] = directories.noise(given, whole)
    for name in common.in_adapter:
        value = beside.mean(sources, name, weights)
        for writer in writers.values():
            writer.save(name, value)
    for writer in writers.values():
        writer.close()
    if common.in_head:
        _write_heads(
            folder,
            list(writers),
            sources,
            common,
            weights,
        )
    return tuple(writers), noise


def _total(noise: Sequence[float | None]) -> float | None:
    """The root of the sum of squares; None where a site has no global factors."""
    squares = [value * value for value in noise if value is not None]
    if len(squares) == len(noise):
        return math.sqrt(math.fsum(squares))
    return None


def _check_rank(rank: int | None, method: str, needs: Needs) -> None:
    if rank is None:
        return
    if not needs.rank:
        takers = named_rules(lambda needs: needs.rank)
        raise AdapterError(
            f"--rank has no meaning for {method}; it is the global rank of {takers}."
        )
    if rank < 1:
        raise AdapterError(f"--rank is {rank}; it must be at least 1.")


def _write_heads(
    folder: Path,
    names: Sequence[str],
    sources: Sequence[Source],
    common: beside.Common,
    weights: Sequence[float],
) -> None:
    """Our own head file beside each output."""
    head = {}
    for name in common.in_head:
        mean = beside.mean(sources, name, weights)
        own_name = name.removeprefix(f"{HEAD}/")
        head[own_name] = mean.float().contiguous()
    for name in names:
        save_file(head, folder / name / HEAD, metadata={"format": "pt"})


def _previous(folder: Path, first: Source, base: str | None) -> Source:
    """The global adapter of the last round's output; an adapter directory itself will do."""
    inner = folder / GLOBAL
    if not inner.is_dir() and not (folder / "adapter_config.json").exists():
        raise AdapterError(
            f"{folder} has no {GLOBAL}; give --previous the output directory of the last round."
        )
    if not inner.is_dir():
        inner = folder
    source = open_source(inner, GLOBAL)
    check_alike(first, source, base=base)
    return source


def _last_round(previous: Path | None) -> int:
    """The number of the last round: 0 without one, and 1 where it is not recorded."""
    if previous is None:
        return 0
    record = previous / RECORD
    if not record.exists():
        return 1
    number = read_json(record).get("round")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise AdapterError(
            f"{record}: round is {number!r}; it must be a whole number of at least 1."
        )
    return number


def _dtype(sources: Sequence[Source]) -> torch.dtype:
    """float32, or float64 where a client has it: means of half-precision factors are not rounded to
    half precision.
    """
    dtypes = {source.dtype for source in sources}
    if torch.float64 in dtypes:
        return torch.float64
    return torch.float32


def _notes(rule: ServerRule, directories: Directories) -> list[str]:
    method = directories.method
    last = directories.previous
    notes = []
    if directories.weighed and isinstance(rule, OwnWeights) and rule.measure:
        notes.append(f"{method} weighs clients by {rule.measure}; --weights was not used.")
    if isinstance(rule, Finds):
        notes += rule.notes()
    if directories.tags is not None:
        notes += directories.tags.notes(last)
    if last is not None and not directories.needs.previous:
        notes.append(f"{method} does not refer to the last round; --previous was not used.")
    bases = {base_of(source) for source in directories.sources}
    if len(bases) > 1:
        names = ", ".join(sorted(bases))
        notes.append(f"Taken for one base model under several names: {names}.")
    return notes
