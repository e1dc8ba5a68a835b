"""What a method is: a server half and a client half, both pure, in one file.

The server half turns what arrived into what goes down next; the client half says what trains and
what leaves. In a deployment the two halves run in different organisations, so they share nothing
but the method's options and the
``Setting``. See ``docs/architecture.md`` for the table of every method against this contract.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, Site, fresh
from fedgrove.adapters.algebra import Indices
from fedgrove.adapters.assembly import Assembly, Mix
from fedgrove.adapters.private import seal, unseal
from fedgrove.adapters.tree import map_tensors
from fedgrove.ground.errors import JobError
from fedgrove.ground.seeds import derive, generator

State = dict[str, Any]
Offer = dict[str, Any]
Mine = dict[str, Any]


class Options(BaseModel):
    """A method's own keys of the job's ``[method]`` section. Every key has a default and a
    description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightedOptions(Options):
    """For methods whose server takes a mean over clients."""

    weights: Literal["examples", "uniform"] = Field(
        "examples",
        description="Weight of a client in the mean: its number of training examples, or the same "
        "for all.",
    )


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client, and a client of itself."""

    name: str
    rank: int
    examples: int


@dataclass(frozen=True)
class Setting:
    """What both halves know from the job and the base model."""

    sites: Mapping[str, Site]
    rank: int  # R, the global rank
    alpha: float
    rounds: int
    seed: int
    scaling: Literal["global", "client"] = "global"

    def scale(self, rank: int) -> float:
        """``alpha / R`` for everyone, or ``alpha / rank`` with ``lora.scaling = "client"``."""
        return self.alpha / (self.rank if self.scaling == "global" else rank)

    def rng(self, *keys: object) -> torch.Generator:
        """A generator for ``(seed, *keys)``; use (round, client, purpose)."""
        return generator(self.seed, *keys)

    def integer(self, *keys: object) -> int:
        return derive(self.seed, *keys)

    def shared_draw(self, rank: int | None = None, purpose: str = "init") -> Adapter:
        """The one random ``A`` (and zero ``B``) that every client starts from; smaller ranks get
        its first rows.

        Drawn from the seed alone, so it costs no message.
        """
        whole = fresh(self.sites, self.rank, 1.0, generator(self.seed, "shared", purpose))
        rank = self.rank if rank is None else rank
        return {
            name: Factors(A=f.A[:rank].clone(), B=f.B[:, :rank].clone(), scale=self.scale(rank))
            for name, f in whole.items()
        }


@dataclass(frozen=True)
class Update:
    """What arrived from one client in one round."""

    client: str
    examples: int
    content: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Step:
    """One stretch of local work. Terms and extras of a later step take over what an earlier one
    trained, by name.
    """

    assembly: Assembly
    penalty: Any = None  # Callable[[Live], Tensor]: added to the task's loss on every batch
    share: float = 1.0  # share of the round's local budget (steps or epochs)
    epochs: float | None = None  # instead of the share: so many passes over the client's data
    head: bool = True  # whether the head trains too, where the head policy lets it
    stream: str = (
        "train"  # purpose of the data order's seed; two steps of one stream see the same batches
    )
    measure: Literal["train", "fisher", "features"] = "train"
    # "fisher": nothing changes, the mean squared gradient of each trained factor comes back in
    # ``Trained.scores``
    # "features": nothing runs but the untouched base; ``Trained.features`` holds the pooled
    # features of some examples
    count: int = (
        0  # how many examples, for "train" and "features" (for "fisher": batches); 0 is all
    )


@dataclass(frozen=True, eq=False)
class Live:
    """What a penalty sees: the tensors as they train now."""

    terms: Mapping[str, Adapter]
    extras: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Trained:
    """What came out of a step. Client-home terms and extras are sealed."""

    assembly: Assembly
    loss: float  # the task's, a mean over the step's batches, without any penalty
    steps: int
    scores: Mapping[str, Adapter] | None = None
    features: Tensor | None = None

    def adapter(self, name: str) -> Adapter:
        return self.assembly.adapter(name)

    def extra(self, name: str) -> Tensor:
        return self.assembly.extras[name].value


Plan = Iterable[Step] | Generator[Step, Trained, None]


class Method:
    """Base class. A method states its identity, then overrides what differs from these defaults."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]  # citation and identifier
    trains: ClassVar[str]
    shares: ClassVar[str]
    keeps: ClassVar[str]
    #: "sum" where adding the clients' updates is all that the server needs (secure aggregation),
    #: else "each"
    reduce: ClassVar[Literal["sum", "each"]] = "each"
    #: "mixed" where clients may have different ranks
    ranks: ClassVar[Literal["equal", "mixed"]] = "equal"
    #: True where an update means the same in a later round than the one it was trained in
    #: (``federation.late``)
    stale: ClassVar[bool] = False
    #: True where the server takes the mean of A and of B for each rank index: then the bound on its
    #: noise holds
    averages_factors: ClassVar[bool] = False
    #: names of terms that are tiers of their own: `fedgrove export --tier` writes one alone
    tiers: ClassVar[tuple[str, ...]] = ()
    #: mixes whose weights depend on the input: by these names a client's model is read back
    #: (``interop.assembly_file``)
    mixes: ClassVar[tuple[type[Mix], ...]] = ()
    #: False where nothing is averaged, so that clients learn nothing from each other
    federated: ClassVar[bool] = True
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Any, setting: Setting):
        self.options = options
        self.setting = setting

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Refuse, with a ``JobError``, clients that the method cannot serve; asked before anything
        is written.
        """

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        """The server's state before the first round."""
        return {}

    def select(
        self, state: State, round: int, available: Sequence[str], fraction: float
    ) -> list[str]:
        """Who trains in this round: a seeded draw of ``fraction`` of the available clients, at
        least one.
        """
        return draw(available, fraction, self.setting.rng(round, "select"))

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        """What goes down to ``client`` before round ``round`` (``rounds + 1``: after the last)."""
        return {}

    def deploy(self, state: State, round: int, client: ClientInfo) -> Offer:
        """What a client's personal model is made of after round ``round``, measured or taken home:
        what the next round would offer it.

        To override where training gets less than the whole model (FedRA).
        """
        return self.offer(state, round + 1, client)

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        """The state after the round. Absent clients are normal; ``updates`` is in name order and
        not empty.
        """
        return state

    def welcome(self, state: State, client: ClientInfo, probe: Mapping[str, Any] | None) -> Offer:
        """What a client that never trained starts from.

        First asked with ``probe = None``: usable at once, and what the client's ``probe`` runs on.
        Where the method has a probe, asked again with what ``probe_report`` sent up.
        """
        return self.deploy(state, self.setting.rounds, client)

    def global_assembly(self, state: State) -> Assembly | None:
        """The one model of all clients, where the method has one; what is merged in the base is its
        ``base_delta``.
        """
        return None

    def needs_each(self) -> str:
        """Why the server needs each client's own update and not only a sum, as a clause; "" where a
        sum is enough.

        Where it is, ``aggregate`` of the one update that is the mean of the clients' ``addend``
        gives the same state.
        """
        return (
            ""
            if self.reduce == "sum"
            else "its server works on each client's own update, not on their sum"
        )

    def addend(self, content: dict[str, Any], offer: Offer) -> dict[str, Any]:
        """An update's content in the shape in which all clients' add up: where it has no number,
        what was offered.
        """
        return content

    def divisors(self, contents: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """What the sum is divided by, a number for each number of ``addend``; None: by the number
        of clients.
        """
        return None

    def reads(self) -> str:
        """What the client half reads of its data beside training steps, as words; "" for nothing
        (``[privacy]``).
        """
        return ""

    def weights(self, updates: Sequence[Update]) -> list[float]:
        """``p_i`` of the method's own mean over this round's clients, for the noise lab
        (``run.noise``).
        """
        return shares(updates, getattr(self.options, "weights", "uniform"))

    def modules(self, update: Update) -> tuple[Adapter, Indices | None] | None:
        """For the noise lab: the rank-1 modules that a client trained and their global rank indices
        (None: the first).

        Only where the server averages by rank index, so that each index has holders and weights of
        its own.
        """
        return None

    def artefacts(self, state: State) -> dict[str, Any]:
        """Plain data by file name, written into the run directory at the end."""
        return {}

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        """The local work of a round. A generator may look at each step's ``Trained`` before it
        yields the next.
        """
        raise NotImplementedError

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        """What travels up, and what stays."""
        raise NotImplementedError

    def probe(self, client: ClientInfo, offer: Offer) -> Plan | None:
        """A newcomer's few local steps before the server places it; None where the method needs no
        placing.
        """
        return None

    def probe_report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer
    ) -> dict[str, Any]:
        """What the probe sends up."""
        return {}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        """What the client deploys. What its terms' ``train`` flags say is what local fine-tuning
        trains.
        """
        raise NotImplementedError

    def penalty(self, client: ClientInfo, offer: Offer, mine: Mine) -> Any:
        """What local fine-tuning of ``personal`` adds to the loss: ``Callable[[Live], Tensor]``, or
        None.
        """
        return None

    def client_artefacts(self, client: ClientInfo, offer: Offer, mine: Mine) -> dict[str, Any]:
        """Plain data by file name on what is private to the client, for its own eyes.

        The local engine, which simulates all clients, merges it into the artefact of that name,
        dictionary by
        dictionary: name the client in it, e.g. ``{"tree.json": {"lambda": {"3": {client.name:
            0.7}}}}``.
        """
        return {}


def draw(available: Sequence[str], fraction: float, rng: torch.Generator) -> list[str]:
    """A random share of the names, at least one, in the given order."""
    count = max(1, round(fraction * len(available)))
    if count >= len(available):
        return list(available)
    chosen = torch.randperm(len(available), generator=rng)[:count].tolist()
    return [available[index] for index in sorted(chosen)]


def shares(updates: Sequence[Update], weights: str) -> list[float]:
    """``p_i`` over the clients of this round: by examples, or uniform; they add up to 1."""
    if weights == "uniform":
        return [1.0 / len(updates)] * len(updates)
    total = sum(update.examples for update in updates)
    return [update.examples / total for update in updates]


def reveal(mine: Any) -> Any:
    """A client's own sealed tensors as plain ones, for arithmetic on its own machine."""
    return map_tensors(mine, unseal)


def keep(tree: Any) -> Any:
    """Seal every tensor of what stays with the client."""
    return map_tensors(tree, seal)


def refuse_unequal_scales(adapters: Sequence[Adapter], method: str) -> None:
    """Factor rules are undefined for unequal scales (methods.md, Scales)."""
    scales = {factors.scale for adapter in adapters for factors in adapter.values()}
    if len(scales) > 1:
        raise JobError(
            f"{method} averages A and B, which is undefined for unequal scales {sorted(scales)}; "
            'set lora.scaling = "global".'
        )
