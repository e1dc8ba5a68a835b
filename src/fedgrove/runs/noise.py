"""The noise lab (``run.noise = true``): what is lost between the server and its clients, round by
round.

Source: the noise analysis of Fed-PLoRA, arXiv 2602.16936, with its bound corrected. ``G`` is the
effective update of the global model, ``M_i`` the one client i starts from, ``D_i`` the one it ends
with, all against the original base.

``RUN/noise.jsonl`` has one line a round: ``round, n_init, n_agg, bound, n_init_adapter, cos_same,
cos_other``, and the same keys for each site under ``sites``. ``RUN/cosines.jsonl`` has the matrix
behind the two cosines, a mean over sites.

* ``n_init``: ``mean_i ||G_{t-1} - M_i||``. It is 0.0, and no rounding error, where every client
  holds G's own modules: those that both hold are taken off before anything is subtracted.
* ``n_init_adapter``: the same without what the server had merged into the base, so FLoRA's is
  ``||G_{t-1}||``.
* ``n_agg``: ``||G_t - ideal||``; the ideal is the mean of the clients' products with the method's
  own weights, for each rank index over those that trained it where the method says so
  (``protocols.Modular``).
* ``bound``: on ``n_agg``, where the server takes means of factors (``protocols.AveragesFactors``);
  else null.
* ``cos_same``, ``cos_other``: mean cosine between modules ``b a^T`` of different clients, of equal
  and of other index.

Totals over sites are root-sum-squares, of cosines plain means. Without a global model the first
four are null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Site
from fedgrove.adapters.algebra import Indices, concat
from fedgrove.adapters.assembly import Assembly, Mix, as_one_adapter
from fedgrove.adapters.noise import (
    Cosines,
    aggregation_noise,
    index_aggregation_noise,
    index_cosines,
    initial_noise,
    noise_bound,
)
from fedgrove.ground import lines
from fedgrove.methods.contract import Method, State, Update
from fedgrove.methods.protocols import Modular, averages_factors, global_assembly, weights

FILE, MATRICES = "noise.jsonl", "cosines.jsonl"
KEYS = ("n_init", "n_agg", "bound", "n_init_adapter", "cos_same", "cos_other")

#: A client's rank-1 modules and their global indices, as ``Modular.modules`` gives them.
Modules = tuple[Adapter, Indices | None]


@dataclass(frozen=True, eq=False)
class Effective:
    """The global model as one adapter, and the part of it that is merged into the base."""

    whole: Adapter
    merged: Adapter


@dataclass(frozen=True, eq=False)
class Seen:
    """What one client of the round did."""

    weight: float
    start: (
        Adapter | None
    )  # M_i and D_i; None where no adapter can express them, or nothing was seen of the client
    end: Adapter | None
    modules: Modules | None  # what it trained, for the cosines and the bound
    by_index: bool  # whether the server averages those by rank index
    sends: bool  # whether those are the server's at all


class Lab:
    """No instrument: a run without ``run.noise``."""

    def truncate_after(self, round: int) -> None:
        """Drop the lines of later rounds, before a resume repeats them."""

    def begin(self, round: int, state: State) -> None:
        """A round begins; ``state`` is the server's."""

    def end(self, state: State, updates: Sequence[Update]) -> None:
        """The round's updates are in ``state`` now: measure and write."""


class NoiseLab(Lab):
    """Watches the client halves of one process and writes a line a round. It changes nothing that
    it sees.
    """

    def __init__(self, method: Method, sites: Mapping[str, Site], folder: Path):
        self.method, self.sites, self.folder = method, sites, folder
        self._round = 0
        self._before: Effective | None = None
        self._starts: dict[
            str, Assembly
        ] = {}  # of the first step that runs something of the server's
        self._ends: dict[
            str, Assembly
        ] = {}  # of the last step that trains something of the server's
        self._own: dict[str, Assembly] = {}  # of the last step of all

    def truncate_after(self, round: int) -> None:
        for name in (FILE, MATRICES):
            lines.truncate_after(self.folder / name, round)

    def begin(self, round: int, state: State) -> None:
        self._round, self._before = round, self._effective(state)
        self._starts, self._ends, self._own = {}, {}, {}

    def seen(self, keys: tuple[object, ...], start: Assembly, end: Assembly) -> None:
        """One step of a client's local work, as ``ClientHalf.watch`` is told of it."""
        round, client = keys[0], str(keys[-1])
        if round != self._round:
            return
        shared = [term for term in start.terms if term.home == "server"]
        if shared or start.base_delta or start.folded:
            self._starts.setdefault(client, start)
        if any(term.train for term in shared):
            self._ends[client] = end
        self._own[client] = end

    def end(self, state: State, updates: Sequence[Update]) -> None:
        line, matrix = self.measure(state, updates)
        lines.append(self.folder / MATRICES, {"round": self._round, "matrix": matrix})
        lines.append(self.folder / FILE, {"round": self._round, **line})

    def measure(
        self, state: State, updates: Sequence[Update]
    ) -> tuple[dict[str, Any], list[list[float | None]]]:
        """The round's line without its number, and the matrix of cosines as a mean over sites
        (None: no pair).
        """
        after = self._effective(state)
        shares = weights(self.method, updates)
        clients = [
            self._client(update, share) for update, share in zip(updates, shares, strict=True)
        ]
        tagged = [index for client in clients if client.modules for index in _all(client.modules)]
        rank = max([self.method.setting.rank, *(index + 1 for index in tagged)])
        sites: dict[str, dict[str, float | None]] = {}
        matrices = []
        for site in self.sites:
            cosines = _cosines(site, clients, rank)
            sites[site] = dict.fromkeys(KEYS)
            if self._before is not None and after is not None:
                sites[site] |= self._losses(site, self._before, after, clients)
            if cosines is not None:
                sites[site] |= {"cos_same": cosines.same, "cos_other": cosines.other}
                matrices.append(cosines.matrix)
        total = {key: _total(key, [found[key] for found in sites.values()]) for key in KEYS}
        return {**total, "sites": sites}, _mean_matrix(matrices, rank)

    def _losses(
        self, site: str, before: Effective, after: Effective, clients: Sequence[Seen]
    ) -> dict[str, float | None]:
        """The three losses and the bound at one site."""
        old, new, merged = _at(before.whole, site), _at(after.whole, site), _at(before.merged, site)
        found: dict[str, float | None] = {}
        if starts := [_at(client.start, site) for client in clients if client.start is not None]:
            found["n_init"] = initial_noise(old, starts).total
            # G - (M_i - merged): a client that starts from the merged base and a fresh adapter has
            # lost all of G.
            found["n_init_adapter"] = initial_noise(concat([old, merged]), starts).total
        senders = [client for client in clients if client.sends]
        if not senders:  # a round of private work alone: nothing should have changed
            return found | {"n_agg": aggregation_noise(new, [old]).total}
        trained = [
            client for client in senders if client.modules is not None and site in client.modules[0]
        ]
        adapters, indices = _modules(site, trained)
        shares = [client.weight for client in trained]
        if all(client.by_index for client in senders):
            found["n_agg"] = (
                index_aggregation_noise(new, old, adapters, indices, shares).total
                if trained
                else aggregation_noise(
                    new, [old]
                ).total  # nobody trained this site: it should be as it was
            )
        elif all(client.end is not None for client in senders):
            held = [
                (client.end, client.weight)
                for client in senders
                if client.end and site in client.end
            ]
            ends = [_at(end, site) for end, _ in held]
            found["n_agg"] = aggregation_noise(
                new, ends or [old], [weight for _, weight in held] or None
            ).total
        if averages_factors(self.method) and all(client.modules is not None for client in senders):
            if trained:
                found["bound"] = noise_bound(old, adapters, indices, shares).total
            else:
                found["bound"] = 0.0
        return found

    def _client(self, update: Update, weight: float) -> Seen:
        name = update.client
        if isinstance(self.method, Modular):
            modules = self.method.modules(update)
        else:
            modules = None
        start, end, own = self._starts.get(name), self._ends.get(name), self._own.get(name)
        found = modules
        if modules is None and own is not None:
            found = trained_modules(own if end is None else end, self.sites)
        return Seen(
            weight=weight,
            start=None if start is None else shared_part(start, self.sites),
            end=None if end is None else shared_part(end, self.sites),
            modules=found,
            by_index=modules is not None,
            sends=modules is not None or end is not None,
        )

    def _effective(self, state: State) -> Effective | None:
        assembly = global_assembly(self.method, state)
        if assembly is None:
            whole = None
        else:
            whole = shared_part(assembly, self.sites)
        if assembly is None or whole is None:
            return None
        merged = Assembly(base_delta=assembly.base_delta, folded=assembly.folded)
        return Effective(whole, as_one_adapter(merged, self.sites))


def shared_part(assembly: Assembly, sites: Mapping[str, Site]) -> Adapter | None:
    """What of a client's model the server has a hand in, as one adapter; None where the mix depends
    on the input.

    Client-home terms are left out, and the weights that mix them with the others.
    """
    terms = tuple(term for term in assembly.terms if term.home == "server")
    if len(terms) < len(assembly.terms):
        assembly = replace(assembly, terms=terms, mix=Mix())
    if not assembly.mix.linear:
        return None
    return as_one_adapter(replace(assembly, layers=None), _present(assembly, sites))


def trained_modules(assembly: Assembly, sites: Mapping[str, Site]) -> Modules | None:
    """The modules of the one term that trains (of those with home "server", else of all); None
    where there are more.
    """
    trained = [term for term in assembly.terms if term.train]
    shared = [term for term in trained if term.home == "server"] or trained
    if len(shared) != 1:
        return None
    return as_one_adapter(Assembly((shared[0],)), _present(assembly, sites)), None


def _present(assembly: Assembly, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites in the layers that the client runs."""
    return {
        name: s
        for name, s in sites.items()
        if assembly.layers is None or s.layer in assembly.layers
    }


def _at(adapter: Adapter, site: str) -> Adapter:
    if site in adapter:
        return {site: adapter[site]}
    return {}


def _modules(site: str, clients: Sequence[Seen]) -> tuple[list[Adapter], list[Indices]]:
    """The clients' modules at one site with their indices; every client has some."""
    found = [client.modules for client in clients if client.modules is not None]
    return [_at(adapter, site) for adapter, _ in found], [_tags(modules, site) for modules in found]


def _tags(modules: Modules, site: str) -> Sequence[int]:
    adapter, indices = modules
    if indices is None:
        return range(adapter[site].rank)
    if isinstance(indices, Mapping):
        return indices[site]
    return indices


def _all(modules: Modules) -> list[int]:
    return [index for site in modules[0] for index in _tags(modules, site)]


def _cosines(site: str, clients: Sequence[Seen], rank: int) -> Cosines | None:
    there = [
        client for client in clients if client.modules is not None and site in client.modules[0]
    ]
    if not there:
        return None
    adapters, indices = _modules(site, there)
    return index_cosines(adapters, rank, indices)[site]


def _total(key: str, values: Sequence[float | None]) -> float | None:
    """Root-sum-square of losses, mean of cosines; None where there is nothing (or, of losses, not
    everything).
    """
    numbers = [value for value in values if value is not None]
    if key.startswith("cos"):
        if numbers:
            return math.fsum(numbers) / len(numbers)
        return None
    if not numbers or len(numbers) < len(values):
        return None
    return math.sqrt(math.fsum(value * value for value in numbers))


def _mean_matrix(matrices: Sequence[Tensor], rank: int) -> list[list[float | None]]:
    """Mean over the sites that have a pair, to four digits."""
    if not matrices:
        return [[None] * rank for _ in range(rank)]
    mean = torch.stack(list(matrices)).nanmean(0)
    return [
        [None if math.isnan(value) else round(value, 4) for value in row] for row in mean.tolist()
    ]
