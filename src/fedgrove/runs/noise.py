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

import torch
from jaxtyping import Float
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
from fedgrove.ground.plain import Plain
from fedgrove.methods.contract import Method, State, Update
from fedgrove.methods.protocols import Modular, averages_factors, global_assembly, weights

FILE, MATRICES = "noise.jsonl", "cosines.jsonl"
KEYS = ("n_init", "n_agg", "bound", "n_init_adapter", "cos_same", "cos_other")

#: A client's rank-1 modules and their global indices, as ``Modular.modules`` gives them.
Modules = tuple[Adapter, Indices | None]

#: Mean cosines of each pair of module indices; None where there is no pair.
Matrix = list[list[float | None]]

#: The figures of ``KEYS`` at one site, as far as there are any.
Figures = dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Effective:
    """The global model as one adapter, and the part of it that is merged into the base."""

    whole: Adapter
    merged: Adapter


@dataclass(frozen=True, eq=False)
class Seen:
    """What one client of the round did."""

    weight: float
    # M_i and D_i; None where no adapter can express them, or nothing was seen of the client
    start: Adapter | None
    end: Adapter | None
    modules: Modules | None  # what it trained, for the cosines and the bound
    by_index: bool  # whether the server averages those by rank index
    sends: bool  # whether those are the server's at all


@dataclass(frozen=True, eq=False)
class Senders:
    """What the clients that sent the server something did at one site."""

    #: modules of those that trained the site, with their indices and the clients' weights
    modules: list[Adapter]
    indices: list[Indices]
    shares: list[float]
    #: the models of those that hold the site, and the clients' weights
    ends: list[Adapter]
    end_shares: list[float]

    @classmethod
    def of(cls, site: str, clients: Sequence[Seen]) -> Senders:
        trained = _trained_at(site, clients)
        modules, indices = _modules(site, trained)
        ends = []
        end_shares = []
        for client in clients:
            if client.end is not None and site in client.end:
                ends.append(_at(client.end, site))
                end_shares.append(client.weight)
        return cls(
            modules=modules,
            indices=indices,
            shares=[client.weight for client in trained],
            ends=ends,
            end_shares=end_shares,
        )


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

    def __init__(
        self,
        method: Method,
        sites: Mapping[str, Site],
        folder: Path,
    ):
        self.method = method
        self.sites = sites
        self.folder = folder
        self._round = 0
        self._before: Effective | None = None
        #: of the first step that runs something of the server's
        self._starts: dict[str, Assembly] = {}
        #: of the last step that trains something of the server's
        self._ends: dict[str, Assembly] = {}
        #: of the last step of all
        self._own: dict[str, Assembly] = {}

    def truncate_after(self, round: int) -> None:
        for name in (FILE, MATRICES):
            lines.truncate_after(self.folder / name, round)

    def begin(self, round: int, state: State) -> None:
        self._round = round
        self._before = self._effective(state)
        self._starts = {}
        self._ends = {}
        self._own = {}

    def seen(
        self,
        keys: tuple[object, ...],
        start: Assembly,
        end: Assembly,
    ) -> None:
        """One step of a client's local work, as ``ClientHalf.watch`` is told of it."""
        if keys[0] != self._round:
            return
        client = str(keys[-1])
        shared = [term for term in start.terms if term.home == "server"]
        if shared or start.base_delta or start.folded:
            self._starts.setdefault(client, start)
        if any(term.train for term in shared):
            self._ends[client] = end
        self._own[client] = end

    def end(self, state: State, updates: Sequence[Update]) -> None:
        line, matrix = self.measure(state, updates)
        number = {"round": self._round}
        lines.append(self.folder / MATRICES, number | {"matrix": matrix})
        lines.append(self.folder / FILE, number | line)

    def measure(self, state: State, updates: Sequence[Update]) -> tuple[Plain, Matrix]:
        """The round's line without its number, and the matrix of cosines as a mean over sites
        (None: no pair).
        """
        after = self._effective(state)
        shares = weights(self.method, updates)
        pairs = zip(updates, shares, strict=True)
        clients = [self._client(update, share) for update, share in pairs]
        rank = self._ranks(clients)
        sites: dict[str, Figures] = {}
        matrices = []
        for site in self.sites:
            figures: Figures = dict.fromkeys(KEYS)
            if self._before is not None and after is not None:
                figures |= self._losses(site, self._before, after, clients)
            cosines = _cosines(site, clients, rank)
            if cosines is not None:
                figures["cos_same"] = cosines.same
                figures["cos_other"] = cosines.other
                matrices.append(cosines.matrix)
            sites[site] = figures
        total: Plain = {}
        for key in KEYS:
            values = [figures[key] for figures in sites.values()]
            total[key] = _total(key, values)
        line = {**total, "sites": sites}
        return line, _mean_matrix(matrices, rank)

    def _ranks(self, clients: Sequence[Seen]) -> int:
        """How many module indices there are: the method's rank, or more where a client has more."""
        most = self.method.setting.rank
        for client in clients:
            if client.modules is not None:
                tags = _all(client.modules)
                most = max([most, *(tag + 1 for tag in tags)])
        return most

    def _losses(
        self,
        site: str,
        before: Effective,
        after: Effective,
        clients: Sequence[Seen],
    ) -> Figures:
        """The three losses and the bound at one site."""
        old = _at(before.whole, site)
        new = _at(after.whole, site)
        merged = _at(before.merged, site)
        found: Figures = {}
        starts = [_at(client.start, site) for client in clients if client.start is not None]
        if starts:
            # G - (M_i - merged): a client that starts from the merged base and a fresh adapter has
            # lost all of G.
            without_merged = concat([old, merged])
            found["n_init"] = initial_noise(old, starts).total
            found["n_init_adapter"] = initial_noise(without_merged, starts).total
        sending = [client for client in clients if client.sends]
        if not sending:  # a round of private work alone: nothing should have changed
            found["n_agg"] = aggregation_noise(new, [old]).total
            return found
        at = Senders.of(site, sending)
        if all(client.by_index for client in sending):
            found["n_agg"] = _index_noise(new, old, at)
        elif all(client.end is not None for client in sending):
            ends = at.ends or [old]
            shares = at.end_shares or None
            found["n_agg"] = aggregation_noise(new, ends, shares).total
        everyone_has_modules = all(client.modules is not None for client in sending)
        if averages_factors(self.method) and everyone_has_modules:
            found["bound"] = _bound(old, at)
        return found

    def _client(self, update: Update, weight: float) -> Seen:
        name = update.client
        modules: Modules | None = None
        if isinstance(self.method, Modular):
            modules = self.method.modules(update)
        start = self._starts.get(name)
        end = self._ends.get(name)
        newest = end
        if newest is None:
            newest = self._own.get(name)
        found = modules
        if modules is None and newest is not None:
            found = trained_modules(newest, self.sites)
        return Seen(
            weight=weight,
            start=self._shared(start),
            end=self._shared(end),
            modules=found,
            by_index=modules is not None,
            sends=modules is not None or end is not None,
        )

    def _shared(self, assembly: Assembly | None) -> Adapter | None:
        if assembly is None:
            return None
        return shared_part(assembly, self.sites)

    def _effective(self, state: State) -> Effective | None:
        assembly = global_assembly(self.method, state)
        whole = self._shared(assembly)
        if assembly is None or whole is None:
            return None
        of_base = Assembly(base_delta=assembly.base_delta, folded=assembly.folded)
        merged = as_one_adapter(of_base, self.sites)
        return Effective(whole, merged)


def _index_noise(new: Adapter, old: Adapter, at: Senders) -> float:
    """What the server lost where it averages modules by their index."""
    if not at.modules:  # nobody trained this site: it should be as it was
        return aggregation_noise(new, [old]).total
    noise = index_aggregation_noise(new, old, at.modules, at.indices, at.shares)
    return noise.total


def _bound(old: Adapter, at: Senders) -> float:
    if not at.modules:
        return 0.0
    return noise_bound(old, at.modules, at.indices, at.shares).total


def shared_part(assembly: Assembly, sites: Mapping[str, Site]) -> Adapter | None:
    """What of a client's model the server has a hand in, as one adapter; None where the mix depends
    on the input.

    Client-home terms are left out, and the weights that mix them with the others.
    """
    shared = [term for term in assembly.terms if term.home == "server"]
    if len(shared) < len(assembly.terms):
        assembly = replace(assembly, terms=tuple(shared), mix=Mix())
    if not assembly.mix.linear:
        return None
    in_all_layers = replace(assembly, layers=None)
    return as_one_adapter(in_all_layers, _present(assembly, sites))


def trained_modules(assembly: Assembly, sites: Mapping[str, Site]) -> Modules | None:
    """The modules of the one term that trains (of those with home "server", else of all); None
    where there are more.
    """
    trained = [term for term in assembly.terms if term.train]
    shared = [term for term in trained if term.home == "server"]
    chosen = shared or trained
    if len(chosen) != 1:
        return None
    alone = Assembly((chosen[0],))
    adapter = as_one_adapter(alone, _present(assembly, sites))
    return adapter, None


def _present(assembly: Assembly, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites in the layers that the client runs."""
    layers = assembly.layers
    if layers is None:
        return dict(sites)
    return {name: site for name, site in sites.items() if site.layer in layers}


def _at(adapter: Adapter, site: str) -> Adapter:
    if site in adapter:
        return {site: adapter[site]}
    return {}


def _modules(site: str, clients: Sequence[Seen]) -> tuple[list[Adapter], list[Indices]]:
    """The clients' modules at one site with their indices; every client has some."""
    found = [client.modules for client in clients if client.modules is not None]
    adapters = [_at(adapter, site) for adapter, _ in found]
    indices: list[Indices] = [_tags(modules, site) for modules in found]
    return adapters, indices


def _trained_at(site: str, clients: Sequence[Seen]) -> list[Seen]:
    """The clients that trained modules at the site."""

    def trained(client: Seen) -> bool:
        return client.modules is not None and site in client.modules[0]

    return [client for client in clients if trained(client)]


def _tags(modules: Modules, site: str) -> Sequence[int]:
    adapter, indices = modules
    if indices is None:
        return range(adapter[site].rank)
    if isinstance(indices, Mapping):
        return indices[site]
    return indices


def _all(modules: Modules) -> list[int]:
    adapter, _ = modules
    found: list[int] = []
    for site in adapter:
        found.extend(_tags(modules, site))
    return found


def _cosines(site: str, clients: Sequence[Seen], rank: int) -> Cosines | None:
    trained = _trained_at(site, clients)
    if not trained:
        return None
    adapters, indices = _modules(site, trained)
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
    squares = [value * value for value in numbers]
    return math.sqrt(math.fsum(squares))


def _mean_matrix(matrices: Sequence[Float[Tensor, "rank rank"]], rank: int) -> Matrix:
    """Mean over the sites that have a pair, to four digits."""
    if not matrices:
        return [[None] * rank for _ in range(rank)]
    stacked = torch.stack(list(matrices))
    rows: list[list[float]] = stacked.nanmean(0).tolist()
    return [[_digits(value) for value in row] for row in rows]


def _digits(value: float) -> float | None:
    if math.isnan(value):
        return None
    return round(value, 4)
