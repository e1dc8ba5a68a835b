"""What a method is: a server half and a client half, both pure, in one file.

The server half turns what arrived into what goes down next; the client half says what trains and
what leaves. In a deployment the two halves run in different organisations, so they share nothing
but the method's options and the ``Setting``. What else a method may be asked, by privacy, the noise
lab, newcomers or the report, is in ``protocols``. See ``docs/architecture.md`` for the table of
every method against this contract.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from typing_extensions import TypeVar

from fedgrove.adapters.adapter import Adapter, Dora, Factors, Sites, fresh, scale_of
from fedgrove.adapters.assembly import Assembly
from fedgrove.adapters.private import seal, unseal
from fedgrove.adapters.tree import map_tensors
from fedgrove.ground.errors import JobError
from fedgrove.ground.seeds import derive, generator

#: What only a method itself knows the kind of. Its own hooks say it: ``state: FedITState``.
State = Any
Offer = Any
Mine = Any
Sent = Any
Probed = Any

Tree = TypeVar("Tree")
Content = TypeVar("Content", default=Any)


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

    sites: Sites
    rank: int  # R, the global rank
    alpha: float
    rounds: int
    seed: int
    scaling: Literal["global", "client"] = "global"
    rslora: bool = False
    #: of a job with DoRA the norms of the base's own weights, row by row, [out] by site: what its
    #: magnitudes start from
    norms: Mapping[str, Tensor] | None = None

    def scale(self, rank: int) -> float:
        """``alpha / R`` for everyone, or ``alpha / rank`` with ``lora.scaling = "client"``; of the
        square root of that rank with ``lora.rslora``.
        """
        if self.scaling == "global":
            rank = self.rank
        return scale_of(self.alpha, rank, self.rslora)

    def rng(self, *keys: object) -> torch.Generator:
        """A generator for ``(seed, *keys)``; use (round, client, purpose)."""
        return generator(self.seed, *keys)

    def integer(self, *keys: object) -> int:
        return derive(self.seed, *keys)

    def shared_draw(
        self,
        rank: int | None = None,
        purpose: str = "init",
    ) -> Adapter:
        """The one random ``A`` (and zero ``B``) that every client starts from, so that it changes
        nothing, at any rank: of two
        ranks the smaller has the first rows of the larger.

        Drawn from the seed alone, so it costs no message.
        """
        if rank is None:
            rank = self.rank
        drawn: Adapter = {}
        for name, first in self._first_rows(purpose).items():
            A = first[:rank].clone()
            if rank > self.rank:
                more = self._more_rows(name, rank - self.rank, purpose)
                A = torch.cat([A, more])
            B = torch.zeros(
                self.sites[name].out_features,
                rank,
                dtype=A.dtype,
            )
            drawn[name] = Factors(A, B, self.scale(rank))
            if self.norms is not None:
                drawn[name] = Dora(A, B, self.scale(rank), self.norms[name].clone())
        return drawn

    def _first_rows(self, purpose: str) -> dict[str, Tensor]:
        """The drawn ``A [R, in]`` of every site."""
        whole = fresh(
            self.sites,
            self.rank,
            1.0,
            generator(self.seed, "shared", purpose),
        )
        return {name: factors.A for name, factors in whole.items()}

    def _more_rows(
        self,
        name: str,
        count: int,
        purpose: str,
    ) -> Tensor:
        """A site's rows ``[count, in]`` beyond R: a draw of their own, so that R's stay what they
        are.
        """
        rng = generator(
            self.seed,
            "shared",
            purpose,
            "beyond",
            name,
        )
        only = {name: self.sites[name]}
        drawn = fresh(only, count, 1.0, rng)
        return drawn[name].A


@dataclass(frozen=True)
class Update(Generic[Content]):
    """What arrived from one client in one round; ``content`` is the method's ``Sent``."""

    client: str
    examples: int
    content: Content
    rank: int = 0  # the client's; 0: of no one client, as the mean of several


@dataclass(frozen=True, eq=False)
class Live:
    """What a penalty sees: the tensors as they train now."""

    terms: Mapping[str, Adapter]
    extras: Mapping[str, Tensor]


Penalty = Callable[[Live], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """One stretch of local work."""

    assembly: Assembly
    penalty: Penalty | None = None  # added to the task's loss on every batch
    # terms and extras that begin where the last earlier step of the plan that trained them ended
    carries: tuple[str, ...] = ()
    share: float = 1.0  # share of the round's local budget (steps or epochs)
    epochs: float | None = None  # instead of the share: so many passes over the client's data
    head: bool = True  # whether the head trains too, where the head policy lets it
    # purpose of the data order's seed; two steps of one stream see the same batches
    stream: str = "train"
    # the stretch of the client's examples that the step sees, in one order of them that is the same
    # in all rounds: what is held out of one step stays unseen by it
    part: tuple[float, float] = (0.0, 1.0)
    # "fisher": nothing changes, the mean squared gradient of each trained factor comes back in
    # ``Trained.scores``
    # "features": nothing trains; ``Trained.features`` holds the pooled features of some examples,
    # of the base with what the assembly adds to it
    # "loss": nothing trains; ``Trained.loss`` is the assembly's mean loss over the examples
    measure: Literal["train", "fisher", "features", "loss"] = "train"
    # how many examples, for all but "fisher" (there: batches); 0 is all
    count: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """What came out of a step. Client-home terms and extras are sealed."""

    assembly: Assembly
    # the task's, a mean over the step's batches (of "loss": over its examples), without any penalty
    loss: float
    steps: int
    scores: Mapping[str, Adapter] | None = None
    features: Tensor | None = None

    def adapter(self, name: str) -> Adapter:
        return self.assembly.adapter(name)

    def extra(self, name: str) -> Tensor:
        """The value ``[...]`` of the extra ``name``."""
        return self.assembly.extras[name].value


Plan = Iterable[Step] | Generator[Step, Trained, None]


class Kinds:
    """What a method's trees are: plain dicts, or frozen dataclasses of its own.

    A dataclass travels and is stored as the dict of its fields, and is made of it again where it
    enters a half (``adapters.tree.typed``). Those of what may be empty need a default for every
    field: ``Mine`` of a client that has trained nothing yet, ``Sent`` where nothing may be sent.
    """

    State: ClassVar[type[Any]] = dict  # of the server
    Offer: ClassVar[type[Any]] = dict  # goes down
    Mine: ClassVar[type[Any]] = dict  # stays with the client
    Sent: ClassVar[type[Any]] = dict  # goes up
    Probed: ClassVar[type[Any]] = dict  # goes up from a newcomer's probe


class Method(Kinds):
    """Base class. A method states its identity, then overrides what differs from these defaults.

    ``aggregate``, ``report`` and ``personal`` have none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]  # citation and identifier
    trains: ClassVar[str]
    shares: ClassVar[str]
    keeps: ClassVar[str]
    #: "mixed" where clients may have different ranks
    ranks: ClassVar[Literal["equal", "mixed"]] = "equal"
    #: True where an update means the same in a later round than the one it was trained in
    #: (``federation.late``)
    stale: ClassVar[bool] = False
    #: whether clients run without some layers of the base
    skips_layers: ClassVar[bool] = False
    #: attributes that ``run.rounds`` decides for rounds long before the last: a run that differs in
    #: one cannot go on to more rounds
    laid_out: ClassVar[tuple[str, ...]] = ()
    #: False where nothing is averaged, so that clients learn nothing from each other
    federated: ClassVar[bool] = True
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Any, setting: Setting):
        self.options = options
        self.setting = setting

    @property
    def complete_from(self) -> int:
        """The first round after which a client's model has all its parts: of a method that trains
        them in phases, the first of the last phase. Earlier rounds are not kept as the best one
        (``run.keep``), and do not count for ``run.patience``.
        """
        return 1

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Refuse, with a ``JobError``, clients that the method cannot serve; asked before anything
        is written.
        """

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        """The server's state before the first round."""
        return self.State()

    def open(self, state: State, round: int) -> State:
        """The state as the offers of round ``round`` are made from it: with what all clients have
        in common worked out once. It is asked once a round and never kept.

        Offers of ``rounds + 1``, ``deploy`` after the round before and ``welcome`` see it too.
        """
        return state

    def select(
        self,
        state: State,
        round: int,
        available: Sequence[str],
        fraction: float,
    ) -> list[str]:
        """Who trains in this round: a seeded draw of ``fraction`` of the available clients, at
        least one.
        """
        return draw(available, fraction, self.setting.rng(round, "select"))

    def offer(
        self,
        state: State,
        round: int,
        client: ClientInfo,
    ) -> Offer:
        """What goes down to ``client`` before round ``round`` (``rounds + 1``: after the last)."""
        return self.Offer()

    def aggregate(
        self,
        state: State,
        round: int,
        updates: Sequence[Update],
    ) -> State:
        """The state after the round. Absent clients are normal; ``updates`` is in name order and
        not empty.
        """
        return state

    def deploy(
        self,
        state: State,
        round: int,
        client: ClientInfo,
    ) -> Offer:
        """What a client's personal model is made of after round ``round``, measured or taken home:
        what the next round would offer it.

        To override where training gets less than the whole model (FedRA).
        """
        return self.offer(state, round + 1, client)

    def welcome(
        self,
        state: State,
        client: ClientInfo,
        probe: Probed | None,
    ) -> Offer:
        """What a client that never trained starts from.

        First asked with ``probe = None``: usable at once, and what the client's ``probe`` runs on.
        Where the method ``Probes``, asked again with what ``probe_report`` sent up.
        """
        return self.deploy(state, self.setting.rounds, client)

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Offer,
        mine: Mine,
        round: int,
    ) -> Plan:
        """The local work of a round: one step on the personal model. A generator may look at each
        step's ``Trained`` before it yields the next.
        """
        return [Step(self.personal(client, offer, mine))]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Offer,
        mine: Mine,
        round: int,
    ) -> tuple[Sent, Mine]:
        """What travels up, and what stays."""
        raise NotImplementedError

    def personal(
        self,
        client: ClientInfo,
        offer: Offer,
        mine: Mine,
    ) -> Assembly:
        """What the client deploys. What its terms' ``train`` flags say is what local fine-tuning
        trains.
        """
        raise NotImplementedError


def draw(
    available: Sequence[str],
    fraction: float,
    rng: torch.Generator,
) -> list[str]:
    """A random share of the names, at least one, in the given order."""
    everybody = len(available)
    count = max(1, round(fraction * everybody))
    if count >= everybody:
        return list(available)
    order = torch.randperm(everybody, generator=rng)
    chosen = order[:count].tolist()
    return [available[index] for index in sorted(chosen)]


def shares(updates: Sequence[Update], weights: str) -> list[float]:
    """``p_i`` over the clients of this round: by examples, or uniform; they add up to 1."""
    if weights == "uniform":
        count = len(updates)
        return [1.0 / count] * count
    total = sum(update.examples for update in updates)
    return [update.examples / total for update in updates]


def reveal(tree: Tree) -> Tree:
    """A client's own sealed tensors as plain ones, for arithmetic on its own machine.

    The kernel needs none: it trains sealed tensors as they are, and seals what a term or an extra
    of the home "client" trained.
    """
    return map_tensors(tree, unseal)


def keep(tree: Tree) -> Tree:
    """Seal every tensor of what stays with the client and was not trained by a term of its home."""
    return map_tensors(tree, seal)


def refuse_unequal_scales(adapters: Sequence[Adapter], method: str) -> None:
    """Factor rules are undefined for unequal scales (methods.md, Scales)."""
    scales: set[float] = set()
    for adapter in adapters:
        scales.update(factors.scale for factors in adapter.values())
    if len(scales) > 1:
        raise JobError(
            f"{method} averages A and B, which is undefined for unequal scales {sorted(scales)}; "
            'set lora.scaling = "global".'
        )
