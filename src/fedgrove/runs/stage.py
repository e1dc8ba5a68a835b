"""What the round loop runs on: the parts of a job, its clients, and an engine that has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from fedgrove.defence.attack import SPLIT, Attackers
from fedgrove.ground.plain import Given, Plain
from fedgrove.runs.engine import Engine
from fedgrove.runs.noise import Lab

if TYPE_CHECKING:
    from fedgrove.federation.tasks import Task
    from fedgrove.interop.models import Base
    from fedgrove.job import Job
    from fedgrove.methods.contract import ClientInfo, Method
    from fedgrove.methods.head import HeadPolicy
    from fedgrove.runs.parts import Parts

E = TypeVar("E", bound=Engine, covariant=True)


class Roster(Protocol):
    """Who takes part, for ``federation.json``."""

    @property
    def source(self) -> Given: ...
    @property
    def remarks(self) -> tuple[str, ...]: ...
    def table(self) -> Plain: ...


@dataclass(frozen=True, eq=False)
class Stage(Generic[E]):
    """A job ready to run, on whichever engine."""

    parts: Parts
    federation: Roster
    engine: E
    clients: dict[str, ClientInfo]  # those that train, in name order; late ones come to it
    held_out: dict[str, ClientInfo]
    fingerprint: str  # of the data: a resumed run must see the same
    lab: Lab = field(default_factory=Lab)  # looks on at what ``run.noise`` records
    called: str = ""  # what the run is called where that is not its method's name

    @property
    def job(self) -> Job:
        return self.parts.job

    @property
    def base(self) -> Base:
        return self.parts.base

    @property
    def task(self) -> Task:
        return self.parts.task

    @property
    def method(self) -> Method:
        return self.parts.method

    @property
    def head(self) -> HeadPolicy:
        return self.parts.head

    @property
    def attackers(self) -> Attackers:
        """Who of the clients attacks; nobody outside a simulation that says so."""
        return Attackers.drawn(self.job.attack, self.clients, self.job.run.seed)

    @property
    def splits(self) -> tuple[str, ...]:
        """What an evaluated round measures: the test split, and the validation split where the job
        holds one out.
        """
        splits = ["test"]
        if self.job.data.validation_fraction:
            splits.append("validation")
        if self.job.attack.tells:
            splits.append(SPLIT)
        return tuple(splits)
