"""A client's side of a round, the same in every engine: offer in, update out, private store
kept.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedgrove.adapters.assembly import Assembly, Term, as_one_adapter, trained_parameters
from fedgrove.adapters.private import unseal
from fedgrove.adapters.tree import nbytes, typed
from fedgrove.federation.tasks.base import Example
from fedgrove.ground.errors import RunError
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Penalty,
    Plan,
    Step,
    Trained,
    Update,
)
from fedgrove.methods.head import PREFIX, HeadPolicy
from fedgrove.methods.protocols import ClientArtefacts, Penalised, Probes
from fedgrove.privacy.example_dp import NOTES, ExampleGuard
from fedgrove.privacy.reference import untouched
from fedgrove.privacy.vector import bounded
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.lanes import Lanes
from fedgrove.training.loop import Clock

if TYPE_CHECKING:
    from fedgrove.job.privacy import PrivacySection

Store = dict[
    str, Any
]  # {"mine": the method's part, "head": the client's own head, "privacy": its key and budget}
Ask = Callable[
    [Mapping[str, Any] | None], Mapping[str, Any]
]  # a probe's report (or None) -> offer to a newcomer

#: ``(clock keys, assembly before, assembly after)`` of each step that trained: see
#: ``ClientHalf.watch``.
Watch = Callable[[tuple[object, ...], Assembly, Assembly], None]


EXPORTED = "exported"  # the one term of a model as it is exported

#: Steps to run, one after the other, each answered by what it gave; at the end all that was
#: trained.
Course = Generator[Work, Trained, list[Trained]]


@dataclass(frozen=True, eq=False)
class Turn:
    """A client's turn in a round."""

    client: ClientInfo
    examples: Sequence[Example]
    offer: Mapping[str, Any]
    store: Store


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one client's round gives: the update for the server, the store for itself, and figures
    for the log.
    """

    update: Update
    store: Store
    loss: float
    steps: int
    trained: int  # numbers that got a gradient
    seconds: float


@dataclass(frozen=True, eq=False)
class Given:
    """What a method's client half works from, each of the kind that the method says."""

    offer: Offer
    mine: Mine


class ClientHalf:
    """Runs the client half of a method on one kernel, or several. It serves any client that is
    passed in.
    """

    def __init__(
        self,
        kernel: Kernel,
        method: Method,
        head: HeadPolicy,
        seed: int,
        rounds: int,
        privacy: PrivacySection | None = None,
        *,
        lanes: Lanes | None = None,
        watch: Watch | None = None,
    ):
        self.kernel, self.method, self.head = kernel, method, head
        self.lanes = lanes or Lanes([kernel])  # the kernel among them
        self.seed, self.rounds = seed, rounds
        #: What protects the client's data: it acts here, so that nobody else need be trusted. None:
        #: nothing does.
        self.privacy = privacy
        #: A measuring instrument (``run.noise``). It sees what is private, so only a simulation in
        #: one process has one.
        self.watch = watch
        self._measured: dict[
            str, tuple[Sequence[Example], bytes, dict[str, float]]
        ] = {}  # each client's last measure

    def alone(self, kernel: Kernel) -> ClientHalf:
        """The same on one kernel of the lanes, for work in it."""
        other = copy.copy(self)
        other.kernel, other.lanes = kernel, Lanes([kernel])
        return other

    def train(
        self,
        client: ClientInfo,
        examples: Sequence[Example],
        offer: Mapping[str, Any],
        store: Store,
        round: int,
    ) -> Outcome:
        """One round of local work."""
        return self.train_together([Turn(client, examples, offer, store)], round)[0]

    def train_together(self, turns: Sequence[Turn], round: int) -> list[Outcome]:
        """One round of several clients' local work, what can be in one batch: as alone, up to
        rounding.
        """
        started = time.perf_counter()
        guards = [self.guard(turn.client, turn.store) for turn in turns]
        givens = [self.given(turn.offer, turn.store) for turn in turns]
        courses = []
        for turn, given, guard in zip(turns, givens, guards, strict=True):
            start, end = (round - 1) / self.rounds, min(1.0, round / self.rounds)
            clock = Clock(self.seed, (round, turn.client.name), start, end)
            plan = self.method.plan(turn.client, given.offer, given.mine, round)
            courses.append(self._course(plan, turn.examples, turn.offer, turn.store, clock, guard))
        worked = follow(self.lanes, courses)
        seconds = (time.perf_counter() - started) / len(turns)
        return [
            self._outcome(turn, given, trained, guard, round, seconds)
            for turn, given, trained, guard in zip(turns, givens, worked, guards, strict=True)
        ]

    def given(self, offer: Mapping[str, Any], store: Store) -> Given:
        """The method's parts of an offer and of a store. Raises ``AdapterError`` for what is none
        of the method's.
        """
        return Given(
            typed(self.method.Offer, offer.get("method", {})),
            typed(self.method.Mine, store.get("mine", {})),
        )

    def _outcome(
        self,
        turn: Turn,
        given: Given,
        trained: list[Trained],
        guard: ExampleGuard | None,
        round: int,
        seconds: float,
    ) -> Outcome:
        client, offer = turn.client, turn.offer
        started = time.perf_counter()
        update, mine = self.method.report(client, trained, given.offer, given.mine, round)
        kept: Store = {"mine": mine}
        sent: dict[str, Any] = {"method": update}
        head = self.head.after(_last(trained))
        if head and self.head.mode != "frozen":
            if self.head.mode == "local":
                kept["head"] = head
            if self.head.travels:
                sent["head"] = head
        if guard is not None:
            kept[NOTES] = guard.notes()
        if self.privacy is not None and self.privacy.clip is not None:
            start = untouched(self.method, self.head, client, offer, round)
            sent = dict(
                bounded(sent, start, self.privacy.clip, f"{self.method.title} at {client.name}")
            )
        steps = sum(t.steps for t in trained)
        if steps:
            loss = sum(t.loss * t.steps for t in trained if t.steps) / steps
        else:
            loss = float("nan")
        return Outcome(
            update=Update(client.name, client.examples, sent, client.rank),
            store=kept,
            loss=loss,
            steps=steps,
            trained=max((trained_parameters(t.assembly) for t in trained if t.steps), default=0),
            seconds=seconds + time.perf_counter() - started,
        )

    def guard(self, client: ClientInfo, store: Store) -> ExampleGuard | None:
        """What keeps single examples private in the client's next work; its budget so far is in the
        store.
        """
        if self.privacy is None:
            return None
        return ExampleGuard.of(self.privacy, store, self.seed, client.name)

    def personal(self, client: ClientInfo, offer: Mapping[str, Any], store: Store) -> Assembly:
        """The client's model as it would deploy it, head included."""
        given = self.given(offer, store)
        assembly = self.method.personal(client, given.offer, given.mine)
        return self.head.attach(assembly, offer, store)

    def penalty(self, client: ClientInfo, offer: Mapping[str, Any], store: Store) -> Penalty | None:
        """What local fine-tuning of the personal model adds to the loss; None for nothing."""
        if not isinstance(self.method, Penalised):
            return None
        given = self.given(offer, store)
        return self.method.penalty(client, given.offer, given.mine)

    def artefacts(
        self, client: ClientInfo, offer: Mapping[str, Any], store: Store
    ) -> dict[str, Any]:
        """Plain data by file name on what is private to the client."""
        if not isinstance(self.method, ClientArtefacts):
            return {}
        given = self.given(offer, store)
        return self.method.client_artefacts(client, given.offer, given.mine)

    def arrive(
        self,
        client: ClientInfo,
        examples: Sequence[Example],
        ask: Ask,
        guard: ExampleGuard | None = None,
    ) -> Mapping[str, Any]:
        """A newcomer's offer: what the server gives at once, or, where the method has a probe, what
        it gives then.
        """
        offer = ask(None)
        report = self.probe(client, examples, offer, guard)
        if report is None:
            return offer
        return ask(report)

    def probe(
        self,
        client: ClientInfo,
        examples: Sequence[Example],
        offer: Mapping[str, Any],
        guard: ExampleGuard | None = None,
    ) -> Any | None:
        """What a newcomer's probe of its first offer found; None where the method has no probe.

        Raises ``RunError`` under example-level privacy without a ``guard``, which counts it.
        """
        if not isinstance(self.method, Probes):
            return None
        content = typed(self.method.Offer, offer.get("method", {}))
        plan = self.method.probe(client, content)
        if plan is None:
            return None
        if guard is None and self.privacy is not None and self.privacy.example_level:
            raise RunError(
                f"The probe with which {self.method.title} places {client.name} would spend of its "
                f"examples' privacy and is not counted, so it is not run."
            )
        clock = Clock(self.seed, ("probe", client.name))
        trained = self._work(plan, examples, offer, {}, clock, guard)
        report = self.method.probe_report(client, trained, content)
        nbytes(report)  # refuses what is private
        return report

    def tune(
        self,
        client: ClientInfo,
        assembly: Assembly,
        examples: Sequence[Example],
        epochs: float,
        penalty: Penalty | None = None,
        guard: ExampleGuard | None = None,
    ) -> Assembly:
        """Local fine-tuning of the personal model: the same for every method."""
        step = Step(assembly, penalty=penalty, epochs=epochs, stream="tune")
        clock = Clock(self.seed, ("tune", client.name), 0.0, 1.0)
        return self.kernel.train(step, examples, clock, guard).assembly

    def deployed(self, assembly: Assembly) -> Assembly:
        """The assembly as it is exported: its terms as the one adapter that computes the same,
        where there is one.
        """
        if not assembly.mix.linear or assembly.layers is not None or not assembly.terms:
            return assembly
        head = {name: extra for name, extra in assembly.extras.items() if name.startswith(PREFIX)}
        adapter = as_one_adapter(assembly, self.kernel.base.sites)
        return Assembly((Term(EXPORTED, adapter, train=""),), extras=head)

    def measure(
        self,
        client: str,
        assembly: Assembly,
        examples: Sequence[Example],
        keep: list[dict[str, Any]] | None = None,
    ) -> dict[str, float]:
        """The task's measures of a client's model as it is exported; ``keep`` takes a language
        model's texts.

        A run ends with the models that its last round measured: what is asked again is not computed
        again.
        """
        model = self.deployed(assembly)
        if self.kernel.writes:
            mark = None
        else:
            mark = _mark(model)
        known, told, measures = self._measured.get(client, (None, None, {}))
        if mark is None or known is not examples or told != mark:
            measures = self.kernel.evaluate(model, examples, keep)
            if mark is not None:
                self._measured[client] = (examples, mark, measures)
        return dict(measures)

    def _work(
        self,
        plan: Plan,
        examples: Sequence[Example],
        offer: Mapping[str, Any],
        store: Store,
        clock: Clock,
        guard: ExampleGuard | None = None,
    ) -> list[Trained]:
        return follow(self.lanes, [self._course(plan, examples, offer, store, clock, guard)])[0]

    def _course(
        self,
        plan: Plan,
        examples: Sequence[Example],
        offer: Mapping[str, Any],
        store: Store,
        clock: Clock,
        guard: ExampleGuard | None,
    ) -> Course:
        """A plan's steps with heads and what they carry over; each waits for its result."""
        done: list[Trained] = []
        if isinstance(plan, Generator):
            steps: Generator[Step, Any, None] = plan
        else:
            steps = (step for step in plan)
        step: Step | None = next(steps, None)
        while step is not None:
            prepared = carry(self.head.step(step, offer, store), done)
            done.append((yield Work(prepared, examples, clock, guard)))
            if self.watch is not None and done[-1].steps:
                self.watch(clock.keys, prepared.assembly, done[-1].assembly)
            try:
                step = steps.send(done[-1])
            except StopIteration:
                step = None
        return done


def follow(lanes: Lanes, courses: Sequence[Course]) -> list[list[Trained]]:
    """Run all courses to their ends, the steps that they wait for at one time together."""
    ends: dict[int, list[Trained]] = {}
    waiting: dict[int, Work] = {}

    def resume(index: int, found: Trained | None) -> None:
        try:
            if found is None:
                waiting[index] = next(courses[index])
            else:
                waiting[index] = courses[index].send(found)
        except StopIteration as stop:
            ends[index] = stop.value

    for index in range(len(courses)):
        resume(index, None)
    while waiting:
        works, waiting = waiting, {}
        for index, found in zip(works, lanes.train(list(works.values())), strict=True):
            resume(index, found)
    return [ends[index] for index in range(len(courses))]


def carry(step: Step, done: Sequence[Trained]) -> Step:
    """The step with what earlier steps trained of the terms and extras that it names, and of the
    head, which is carried for every method.

    Raises ``RunError`` where it names what it has not, or what no earlier step trained.
    """
    terms = {term.name: term for each in done for term in each.assembly.terms if term.train}
    extras = {n: e for each in done for n, e in each.assembly.extras.items() if e.train}
    assembly = step.assembly
    own = {*(term.name for term in assembly.terms), *assembly.extras}
    for name in step.carries:
        if name not in own or name not in {*terms, *extras}:
            if name in own:
                lacks = "that no step before it trained"
            else:
                lacks = "that it does not have"
            raise RunError(f"A step of the method's plan carries over '{name}', {lacks}.")
    heads = {name for name in assembly.extras if name.startswith(PREFIX)}
    carried = (heads | set(step.carries)) & set(extras)
    return replace(
        step,
        assembly=replace(
            assembly,
            terms=tuple(
                replace(term, adapter=terms[term.name].adapter, diagonal=terms[term.name].diagonal)
                if term.name in step.carries
                else term
                for term in assembly.terms
            ),
            extras={
                name: replace(extra, value=unseal(extras[name].value)) if name in carried else extra
                for name, extra in assembly.extras.items()
            },
        ),
    )


def _last(trained: Sequence[Trained]) -> Assembly:
    """The assembly with the newest head: of the last step that trained something."""
    worked = [t.assembly for t in trained if t.steps]
    if worked:
        return worked[-1]
    return Assembly()


def _mark(model: Assembly) -> bytes | None:
    """The digest of an exported model; None where it is more than one adapter and a head."""
    if [term.name for term in model.terms] != [EXPORTED]:
        return None
    tensors = [(name, extra.value) for name, extra in model.extras.items()]
    for site, factors in model.terms[0].adapter.items():
        tensors += [(f"{site} A {factors.scale}", factors.A), (f"{site} B", factors.B)]
    whole = hashlib.sha256()
    for name, value in sorted(tensors, key=lambda pair: pair[0]):
        whole.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        whole.update(unseal(value).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return whole.digest()
