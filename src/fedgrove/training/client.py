"""A client's side of a round, the same in every engine: offer in, update out, private store
kept.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedgrove.adapters.assembly import Assembly, Extra, Term, as_one_adapter, trained_parameters
from fedgrove.adapters.private import unseal
from fedgrove.adapters.tree import nbytes, typed
from fedgrove.federation.encoded import origin_of
from fedgrove.federation.tasks.base import Example
from fedgrove.ground import plain
from fedgrove.ground.errors import RunError
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Penalty,
    Plan,
    Probed,
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
from fedgrove.training.readers import Found

if TYPE_CHECKING:
    from fedgrove.job.privacy import PrivacySection

#: {"mine": the method's part, "head": the client's own head, "privacy": its key and budget}
Store = plain.Plain

#: a probe's report (or None) -> offer to a newcomer
Ask = Callable[[plain.Given | None], plain.Given]

#: ``(clock keys, assembly before, assembly after)`` of each step that trained: see
#: ``ClientHalf.watch``.
Watch = Callable[[tuple[object, ...], Assembly, Assembly], None]


EXPORTED = "exported"  # the one term of a model as it is exported

#: Steps to run, one after the other, each answered by what it gave; at the end all that was
#: trained.
LocalWork = Generator[Work, Trained, list[Trained]]


@dataclass(frozen=True, eq=False)
class ClientRound:
    """A client's turn in a round."""

    client: ClientInfo
    examples: Sequence[Example]
    offer: plain.Given
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
class Measured:
    """What a client's model was last measured to be."""

    origin: object  # of the examples
    mark: bytes  # of the model
    measures: dict[str, float]
    found: Found


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
        self.kernel = kernel
        self.method = method
        self.head = head
        self.lanes = lanes or Lanes([kernel])  # the kernel among them
        self.seed = seed
        self.rounds = rounds
        #: What protects the client's data: it acts here, so that nobody else need be trusted. None:
        #: nothing does.
        self.privacy = privacy
        #: A measuring instrument (``run.noise``). It sees what is private, so only a simulation in
        #: one process has one.
        self.watch = watch
        self._measured: dict[str, Measured] = {}

    def alone(self, kernel: Kernel) -> ClientHalf:
        """The same on one kernel of the lanes, for work in it."""
        other = copy.copy(self)
        other.kernel = kernel
        other.lanes = Lanes([kernel])
        return other

    def train(
        self,
        client: ClientInfo,
        examples: Sequence[Example],
        offer: plain.Given,
        store: Store,
        round: int,
    ) -> Outcome:
        """One round of local work."""
        turn = ClientRound(client, examples, offer, store)
        (outcome,) = self.train_together([turn], round)
        return outcome

    def train_together(self, turns: Sequence[ClientRound], round: int) -> list[Outcome]:
        """One round of several clients' local work, what can be in one batch: as alone, up to
        rounding.
        """
        started = time.perf_counter()
        guards = [self.guard(turn.client, turn.store) for turn in turns]
        givens = [self.given(turn.offer, turn.store) for turn in turns]
        courses = []
        for turn, given, guard in zip(turns, givens, guards, strict=True):
            clock = self._clock(round, turn.client)
            plan = self.method.plan(turn.client, given.offer, given.mine, round)
            course = self._course(
                plan,
                turn.examples,
                turn.offer,
                turn.store,
                clock,
                guard,
            )
            courses.append(course)
        worked = follow(self.lanes, courses)
        seconds = (time.perf_counter() - started) / len(turns)
        outcomes = []
        for turn, given, trained, guard in zip(turns, givens, worked, guards, strict=True):
            outcome = self._outcome(turn, given, trained, guard, round, seconds)
            outcomes.append(outcome)
        return outcomes

    def _clock(self, round: int, client: ClientInfo) -> Clock:
        return Clock(
            seed=self.seed,
            keys=(round, client.name),
            start=(round - 1) / self.rounds,
            end=min(1.0, round / self.rounds),
        )

    def given(self, offer: plain.Given, store: Store) -> Given:
        """The method's parts of an offer and of a store. Raises ``AdapterError`` for what is none
        of the method's.
        """
        down = offer.get("method", {})
        kept = store.get("mine", {})
        return Given(
            offer=typed(self.method.Offer, down),
            mine=typed(self.method.Mine, kept),
        )

    def _outcome(
        self,
        turn: ClientRound,
        given: Given,
        trained: list[Trained],
        guard: ExampleGuard | None,
        round: int,
        seconds: float,
    ) -> Outcome:
        client = turn.client
        started = time.perf_counter()
        update, mine = self.method.report(client, trained, given.offer, given.mine, round)
        kept: Store = {"mine": mine}
        sent: plain.Plain = {"method": update}
        head = self.head.after(_last(trained))
        if head and self.head.mode != "frozen":
            if self.head.mode == "local":
                kept["head"] = head
            if self.head.travels:
                sent["head"] = head
        if guard is not None:
            kept[NOTES] = guard.notes()
        sent = self._bounded(sent, client, turn.offer, round)
        worked = [each for each in trained if each.steps]
        steps = sum(each.steps for each in worked)
        loss = float("nan")
        if steps:
            loss = sum(each.loss * each.steps for each in worked) / steps
        numbers = [trained_parameters(each.assembly) for each in worked]
        return Outcome(
            update=Update(client.name, client.examples, sent, client.rank),
            store=kept,
            loss=loss,
            steps=steps,
            trained=max(numbers, default=0),
            seconds=seconds + time.perf_counter() - started,
        )

    def _bounded(
        self,
        sent: plain.Plain,
        client: ClientInfo,
        offer: plain.Given,
        round: int,
    ) -> plain.Plain:
        """The update, its change clipped where ``[privacy] clip`` says so."""
        if self.privacy is None or self.privacy.clip is None:
            return sent
        start = untouched(self.method, self.head, client, offer, round)
        who = f"{self.method.title} at {client.name}"
        return dict(bounded(sent, start, self.privacy.clip, who))

    def guard(self, client: ClientInfo, store: Store) -> ExampleGuard | None:
        """What keeps single examples private in the client's next work; its budget so far is in the
        store.
        """
        if self.privacy is None:
            return None
        return ExampleGuard.of(self.privacy, store, self.seed, client.name)

    def personal(self, client: ClientInfo, offer: plain.Given, store: Store) -> Assembly:
        """The client's model as it would deploy it, head included."""
        given = self.given(offer, store)
        assembly = self.method.personal(client, given.offer, given.mine)
        return self.head.attach(assembly, offer, store)

    def penalty(self, client: ClientInfo, offer: plain.Given, store: Store) -> Penalty | None:
        """What local fine-tuning of the personal model adds to the loss; None for nothing."""
        if not isinstance(self.method, Penalised):
            return None
        given = self.given(offer, store)
        return self.method.penalty(client, given.offer, given.mine)

    def artefacts(
        self,
        client: ClientInfo,
        offer: plain.Given,
        store: Store,
    ) -> plain.Plain:
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
    ) -> plain.Given:
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
        offer: plain.Given,
        guard: ExampleGuard | None = None,
    ) -> Probed | None:
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
        step = Step(
            assembly,
            penalty=penalty,
            epochs=epochs,
            stream="tune",
        )
        clock = Clock(self.seed, ("tune", client.name))
        trained = self.kernel.train(step, examples, clock, guard)
        return trained.assembly

    def deployed(self, assembly: Assembly) -> Assembly:
        """The assembly as it is exported: its terms as the one adapter that computes the same,
        where there is one.
        """
        if not assembly.mix.linear or assembly.layers is not None or not assembly.terms:
            return assembly
        extras = assembly.extras
        head = {name: extra for name, extra in extras.items() if name.startswith(PREFIX)}
        adapter = as_one_adapter(assembly, self.kernel.base.sites)
        whole = Term(EXPORTED, adapter, train="")
        return Assembly((whole,), extras=head)

    def measure(
        self,
        client: str,
        assembly: Assembly,
        examples: Sequence[Example],
        found: Found | None = None,
    ) -> dict[str, float]:
        """The task's measures of a client's model as it is exported; ``found`` takes what it
        answered.

        A run ends with the models that its last round measured: what is asked again is not computed
        again.
        """
        model = self.deployed(assembly)
        mark = None
        if not self.kernel.writes:
            mark = _mark(model)
        if mark is None:
            return self.kernel.evaluate(model, examples, found)
        known = self._measured.get(client)
        origin = origin_of(examples)
        if known is None or known.origin is not origin or known.mark != mark:
            answers: Found = {}
            measures = self.kernel.evaluate(model, examples, answers)
            known = Measured(origin, mark, measures, answers)
            self._measured[client] = known
        if found is not None:
            found.update(known.found)
        return dict(known.measures)

    def _work(
        self,
        plan: Plan,
        examples: Sequence[Example],
        offer: plain.Given,
        store: Store,
        clock: Clock,
        guard: ExampleGuard | None = None,
    ) -> list[Trained]:
        course = self._course(plan, examples, offer, store, clock, guard)
        (trained,) = follow(self.lanes, [course])
        return trained

    def _course(
        self,
        plan: Plan,
        examples: Sequence[Example],
        offer: plain.Given,
        store: Store,
        clock: Clock,
        guard: ExampleGuard | None,
    ) -> LocalWork:
        """A plan's steps with heads and what they carry over; each waits for its result."""
        done: list[Trained] = []
        if isinstance(plan, Generator):
            steps: Generator[Step, Any, None] = plan
        else:
            steps = (step for step in plan)
        step: Step | None = next(steps, None)
        while step is not None:
            with_head = self.head.step(step, offer, store)
            prepared = carry(with_head, done)
            trained = yield Work(prepared, examples, clock, guard)
            done.append(trained)
            if self.watch is not None and trained.steps:
                self.watch(clock.keys, prepared.assembly, trained.assembly)
            try:
                step = steps.send(trained)
            except StopIteration:
                step = None
        return done


def follow(lanes: Lanes, courses: Sequence[LocalWork]) -> list[list[Trained]]:
    """Run all courses to their ends, the steps that they wait for at one time together."""
    ends: dict[int, list[Trained]] = {}
    waiting: dict[int, Work] = {}

    def resume(index: int, found: Trained | None) -> None:
        course = courses[index]
        try:
            if found is None:
                waiting[index] = next(course)
            else:
                waiting[index] = course.send(found)
        except StopIteration as stop:
            ends[index] = stop.value

    for index in range(len(courses)):
        resume(index, None)
    while waiting:
        works = waiting
        waiting = {}
        answers = lanes.train(list(works.values()))
        for index, found in zip(works, answers, strict=True):
            resume(index, found)
    return [ends[index] for index in range(len(courses))]


def carry(step: Step, done: Sequence[Trained]) -> Step:
    """The step with what earlier steps trained of the terms and extras that it names, and of the
    head, which is carried for every method.

    Raises ``RunError`` where it names what it has not, or what no earlier step trained.
    """
    terms, extras = _trained_parts(done)
    assembly = step.assembly
    own = {*(term.name for term in assembly.terms), *assembly.extras}
    for name in step.carries:
        if name not in own:
            raise RunError(
                f"A step of the method's plan carries over '{name}', that it does not have."
            )
        if name not in terms and name not in extras:
            raise RunError(
                f"A step of the method's plan carries over '{name}', that no step before it "
                f"trained."
            )
    carried_terms = []
    for term in assembly.terms:
        if term.name in step.carries:
            newest = terms[term.name]
            term = replace(term, adapter=newest.adapter, diagonal=newest.diagonal)
        carried_terms.append(term)
    carried_extras = {}
    for name, extra in assembly.extras.items():
        wanted = name.startswith(PREFIX) or name in step.carries
        if wanted and name in extras:
            extra = replace(extra, value=unseal(extras[name].value))
        carried_extras[name] = extra
    carried = replace(assembly, terms=tuple(carried_terms), extras=carried_extras)
    return replace(step, assembly=carried)


def _trained_parts(done: Sequence[Trained]) -> tuple[dict[str, Term], dict[str, Extra]]:
    """The terms and the extras that steps trained, by name, as the last of them left each."""
    terms: dict[str, Term] = {}
    extras: dict[str, Extra] = {}
    for each in done:
        for term in each.assembly.terms:
            if term.train:
                terms[term.name] = term
        trained = {name: extra for name, extra in each.assembly.extras.items() if extra.train}
        extras |= trained
    return terms, extras


def _last(trained: Sequence[Trained]) -> Assembly:
    """The assembly with the newest head: of the last step that trained something."""
    for each in reversed(trained):
        if each.steps:
            return each.assembly
    return Assembly()


def _mark(model: Assembly) -> bytes | None:
    """The digest of an exported model; None where it is more than one adapter and a head."""
    if [term.name for term in model.terms] != [EXPORTED]:
        return None
    tensors = [(name, extra.value) for name, extra in model.extras.items()]
    for site, factors in model.terms[0].adapter.items():
        for letter, value in factors.tensors.items():
            tensors.append((f"{site} {letter} {factors.scale}", value))
    whole = hashlib.sha256()
    for name, value in sorted(tensors, key=lambda pair: pair[0]):
        described = f"{name} {tuple(value.shape)} {value.dtype}"
        whole.update(described.encode())
        flat = unseal(value).cpu().contiguous().view(-1)
        numbers = flat.view(torch.uint8).numpy()
        whole.update(numbers.data)
    return whole.digest()
