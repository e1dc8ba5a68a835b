"""What a method may also be: small protocols that privacy, newcomers, the noise lab and the report
ask for by ``isinstance``.

A method satisfies one by having its members; naming it as a base class adds the bodies that stand
here. Values may depend on the method's options. What no method is asked without having said it
stands in ``contract``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import Indices
from fedgrove.adapters.assembly import Assembly, Mix
from fedgrove.ground.plain import Given, Plain
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Penalty,
    Plan,
    Probed,
    Sent,
    State,
    Trained,
    Update,
    shares,
)

EACH = "its server works on each client's own update, not on their sum"


# ----------------------------------------------------------------------- privacy
@runtime_checkable
class Summable(Protocol):
    """The server needs no more than the sum of the clients' updates: ``aggregate`` of the one
    update that is the mean of the clients' ``addend`` gives the same state.
    """

    def addend(self, content: Sent, offer: Offer) -> Sent:
        """An update's content in the shape in which all clients' add up: where it has no number,
        what was offered.
        """
        return content


@runtime_checkable
class Counted(Protocol):
    """A sum that is not divided by the number of clients alone."""

    def divisors(self, contents: Sequence[Sent]) -> Given:
        """What the sum is divided by, a number for each number of ``addend``."""


@runtime_checkable
class NeedsEach(Protocol):
    """Has words of its own on why a sum is not enough."""

    def needs_each(self) -> str:
        """Why the server needs each client's own update, as a clause; "" where a sum is enough."""


@runtime_checkable
class ReadsData(Protocol):
    """The client half reads its data beside training steps."""

    def reads(self) -> str:
        """What it reads, as words; "" for nothing."""


def needs_each(method: Method) -> str:
    """Why the server needs each client's own update, as a clause; "" where a sum is enough."""
    if isinstance(method, NeedsEach):
        return method.needs_each()
    return "" if isinstance(method, Summable) else EACH


def addend(
    method: Method,
    content: Sent,
    offer: Offer,
) -> Sent:
    """An update's content as it adds up; of a method that sums nothing, as it is."""
    return method.addend(content, offer) if isinstance(method, Summable) else content


def reads(method: Method) -> str:
    """What the client half reads of its data beside training steps; "" for nothing."""
    return method.reads() if isinstance(method, ReadsData) else ""


# ------------------------------------------------------------------------ sizes
@runtime_checkable
class HigherRanks(Protocol):
    """Factors in an update can have a higher rank than the federation's R."""

    def most_rank(self) -> int:
        """The largest that an update can have. A higher one is refused unread."""


@runtime_checkable
class SendsTables(Protocol):
    """An update has tables by layer that are no factors, such as a router."""

    def most_rows(self) -> int:
        """The most rows of one. A larger one is refused unread."""


def most_rank(method: Method) -> int:
    """The largest rank of factors in an update."""
    if isinstance(method, HigherRanks):
        return max(method.most_rank(), method.setting.rank)
    return method.setting.rank


def most_rows(method: Method) -> int:
    """The most rows of any other table in an update: a side of a factor, or what the method says."""
    rank = most_rank(method)
    return max(method.most_rows(), rank) if isinstance(method, SendsTables) else rank


# --------------------------------------------------------------------- newcomers
@runtime_checkable
class Probes(Protocol):
    """The server places a newcomer by what a few local steps gave."""

    def probe(self, client: ClientInfo, offer: Offer) -> Plan | None:
        """Those steps; None where this offer needs no placing."""

    def probe_report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Offer,
    ) -> Probed:
        """What the probe sends up."""


@runtime_checkable
class Placed(Protocol):
    """An offer to a newcomer that says where the server put it."""

    placed: str


def placed(offer: Offer) -> str:
    """Where the server put a newcomer, in words; "" where it has no places."""
    found = offer.get("placed", "") if isinstance(offer, Mapping) else getattr(offer, "placed", "")
    return str(found)


# ------------------------------------------------------------------------ models
@runtime_checkable
class HasGlobal(Protocol):
    """There may be one model of all clients."""

    def global_assembly(self, state: State) -> Assembly | None:
        """That model, where there is one now; what is merged in the base is its ``base_delta``."""


@runtime_checkable
class Penalised(Protocol):
    """Local fine-tuning of ``personal`` adds something to the loss."""

    def penalty(
        self,
        client: ClientInfo,
        offer: Offer,
        mine: Mine,
    ) -> Penalty | None:
        """What it adds; None for nothing."""


@runtime_checkable
class Tiered(Protocol):
    """Some terms are tiers of their own: ``fedgrove export --tier`` writes one alone."""

    tiers: Sequence[str]  # their names


@runtime_checkable
class HasMixes(Protocol):
    """Some mixes have weights that depend on the input; by these names a model is read back.

    On the class, and of all options: who reads a model has no options.
    """

    mixes: Sequence[type[Mix]]


def global_assembly(method: Method, state: State) -> Assembly | None:
    """The one model of all clients, where the method has one."""
    return method.global_assembly(state) if isinstance(method, HasGlobal) else None


def tiers(method: Method) -> Sequence[str]:
    """The names of the terms that are tiers."""
    return method.tiers if isinstance(method, Tiered) else ()


def mixes(kind: type[Method]) -> Sequence[type[Mix]]:
    """The mixes by whose names a model of the method is read back."""
    return kind.mixes if isinstance(kind, HasMixes) else ()


# --------------------------------------------------------------------- noise lab
@runtime_checkable
class Weighs(Protocol):
    """Has a mean whose weights are not those of its option ``weights``."""

    def weights(self, updates: Sequence[Update]) -> list[float]:
        """``p_i`` of that mean over this round's clients."""


@runtime_checkable
class Modular(Protocol):
    """The server averages by rank index, so that each index has holders and weights of its own."""

    def modules(self, update: Update) -> tuple[Adapter, Indices | None]:
        """The rank-1 modules that a client trained and their global rank indices (None: the
        first).
        """


@runtime_checkable
class AveragesFactors(Protocol):
    """The server takes the mean of A and of B for each rank index: the bound on its noise holds."""

    averages_factors: bool  # False where a subclass does not


def weights(method: Method, updates: Sequence[Update]) -> list[float]:
    """``p_i`` of the method's own mean over this round's clients."""
    if isinstance(method, Weighs):
        return method.weights(updates)
    return shares(updates, getattr(method.options, "weights", "uniform"))


def averages_factors(method: Method) -> bool:
    """Whether the server takes the mean of A and of B for each rank index."""
    return isinstance(method, AveragesFactors) and method.averages_factors


# ----------------------------------------------------------------------- defence
@runtime_checkable
class Unmeasured(Protocol):
    """What a client would send without training may not follow from its offer, so that the server
    cannot tell what it changed.
    """

    def unmeasured(self) -> str:
        """Why, as a clause; "" where it follows."""


def unmeasured(method: Method) -> str:
    """Why the server cannot tell what a client changed, as a clause; "" where it can."""
    return method.unmeasured() if isinstance(method, Unmeasured) else ""


@runtime_checkable
class Centred(Protocol):
    """The server's means all pass ``adapters.centre``, so that a robust rule can take their place."""

    centres: str  # "values": of factors; "weights": of products, whose members can be weighed


def centres(method: Method) -> str:
    """What a defence can do to the method's means: "values" and weights, "weights", or "none"."""
    return method.centres if isinstance(method, Centred) else "none"


# ------------------------------------------------------------------------- files
@runtime_checkable
class ServerArtefacts(Protocol):
    """The server has something to show after a run."""

    def artefacts(self, state: State) -> Plain:
        """Plain data by file name, written into the run directory at the end."""


@runtime_checkable
class ClientArtefacts(Protocol):
    """A client has something to show that is private to it."""

    def client_artefacts(
        self,
        client: ClientInfo,
        offer: Offer,
        mine: Mine,
    ) -> Plain:
        """Plain data by file name, for the client's own eyes.

        The local engine, which simulates all clients, merges it into the artefact of that name,
        dictionary by dictionary: name the client in it, e.g. ``{"tree.json": {"lambda": {"3":
        {client.name: 0.7}}}}``.
        """
