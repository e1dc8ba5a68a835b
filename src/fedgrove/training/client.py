"""A client's side of a round, the same in every engine: offer in, update out, private store kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Term, as_one_adapter, trained_parameters
from fedgrove.federation.tasks.base import Example
from fedgrove.methods.contract import ClientInfo, Live, Method, Step, Trained, Update
from fedgrove.training.head import PREFIX, HeadPolicy
from fedgrove.training.kernel import Clock, Kernel, carry
from fedgrove.tree import nbytes

Store = dict[str, Any]  # {"mine": the method's part, "head": the client's own head}
Ask = Callable[[Mapping[str, Any] | None], Mapping[str, Any]]  # a probe's report (or None) -> offer to a newcomer

#: ``(clock keys, assembly before, assembly after)`` of each step that trained: see ``ClientHalf.watch``.
Watch = Callable[[tuple[object, ...], Assembly, Assembly], None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one client's round gives: the update for the server, the store for itself, and figures for the log."""

    update: Update
    store: Store
    loss: float
    steps: int
    trained: int  # numbers that got a gradient
    seconds: float


class ClientHalf:
    """Runs the client half of a method on one kernel. It serves any client that is passed in."""

    def __init__(self, kernel: Kernel, method: Method, head: HeadPolicy, seed: int, rounds: int):
        self.kernel, self.method, self.head = kernel, method, head
        self.seed, self.rounds = seed, rounds
        #: A measuring instrument (``run.noise``). It sees what is private, so only a simulation in one process sets it.
        self.watch: Watch | None = None

    def train(
        self, client: ClientInfo, examples: Sequence[Example], offer: Mapping[str, Any], store: Store, round: int
    ) -> Outcome:
        """One round of local work."""
        started = time.perf_counter()
        mine = store.get("mine", {})
        content = dict(offer.get("method", {}))
        clock = Clock(self.seed, (round, client.name), (round - 1) / self.rounds, min(1.0, round / self.rounds))
        trained = self._work(self.method.plan(client, content, mine, round), examples, offer, store, clock)
        update, mine = self.method.report(client, trained, content, mine, round)
        kept: Store = {"mine": mine}
        sent: dict[str, Any] = {"method": update}
        head = self.head.after(_last(trained))
        if head and self.head.mode != "frozen":
            if self.head.mode == "local":
                kept["head"] = head
            if self.head.travels:
                sent["head"] = head
        steps = sum(t.steps for t in trained)
        loss = sum(t.loss * t.steps for t in trained if t.steps) / steps if steps else float("nan")
        return Outcome(
            update=Update(client.name, client.examples, sent),
            store=kept,
            loss=loss,
            steps=steps,
            trained=max((trained_parameters(t.assembly) for t in trained if t.steps), default=0),
            seconds=time.perf_counter() - started,
        )

    def personal(self, client: ClientInfo, offer: Mapping[str, Any], store: Store) -> Assembly:
        """The client's model as it would deploy it, head included."""
        assembly = self.method.personal(client, dict(offer.get("method", {})), store.get("mine", {}))
        return self.head.attach(assembly, offer, store)

    def arrive(self, client: ClientInfo, examples: Sequence[Example], ask: Ask) -> Mapping[str, Any]:
        """A newcomer's offer: what the server gives at once, or, where the method has a probe, what it gives then."""
        offer = ask(None)
        content = dict(offer.get("method", {}))
        plan = self.method.probe(client, content)
        if plan is None:
            return offer
        trained = self._work(plan, examples, offer, {}, Clock(self.seed, ("probe", client.name)))
        report = self.method.probe_report(client, trained, content)
        nbytes(report)  # refuses what is private
        return ask(report)

    def tune(
        self,
        client: ClientInfo,
        assembly: Assembly,
        examples: Sequence[Example],
        epochs: float,
        penalty: Callable[[Live], Tensor] | None = None,
    ) -> Assembly:
        """Local fine-tuning of the personal model: the same for every method."""
        step = Step(assembly, penalty=penalty, epochs=epochs, stream="tune")
        clock = Clock(self.seed, ("tune", client.name), 0.0, 1.0)
        return self.kernel.train(step, examples, clock).assembly

    def deployed(self, assembly: Assembly) -> Assembly:
        """The assembly as it is exported: its terms as the one adapter that computes the same, where there is one."""
        if not assembly.mix.linear or assembly.layers is not None or not assembly.terms:
            return assembly
        head = {name: extra for name, extra in assembly.extras.items() if name.startswith(PREFIX)}
        adapter = as_one_adapter(assembly, self.kernel.base.sites)
        return Assembly((Term("adapter", adapter, train=""),), extras=head)

    def _work(
        self, plan: Any, examples: Sequence[Example], offer: Mapping[str, Any], store: Store, clock: Clock
    ) -> list[Trained]:
        done: list[Trained] = []

        def run(step: Step) -> Trained:
            prepared = carry(self.head.step(step, offer, store), done)
            done.append(self.kernel.train(prepared, examples, clock))
            if self.watch is not None and done[-1].steps:
                self.watch(clock.keys, prepared.assembly, done[-1].assembly)
            return done[-1]

        if isinstance(plan, Generator):
            try:
                step = next(plan)
                while True:
                    step = plan.send(run(step))
            except StopIteration:
                pass
        else:
            for step in plan:
                run(step)
        return done


def _last(trained: Sequence[Trained]) -> Assembly:
    """The assembly with the newest head: of the last step that trained something."""
    worked = [t.assembly for t in trained if t.steps]
    return worked[-1] if worked else Assembly()
