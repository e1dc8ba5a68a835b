"""The round loop. It knows nothing of progress bars, logs or plots: those are given to it
(``records``), and who trains the clients is the engine's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from fedgrove.adapters.tree import Tree, typed
from fedgrove.defence.changes import Changes
from fedgrove.defence.shield import Shield
from fedgrove.ground.ctrlc import stop_if_pressed
from fedgrove.ground.errors import AdapterError, FedgroveError, RunError
from fedgrove.ground.plain import Given, Plain
from fedgrove.methods.contract import ClientInfo, State, Update
from fedgrove.privacy.client_dp import protection
from fedgrove.runs.choice import Choice, Rule
from fedgrove.runs.engine import Absence, Arrival, Engine
from fedgrove.runs.ledger import Ledger
from fedgrove.runs.records import Records
from fedgrove.runs.sampled import drawn
from fedgrove.runs.stage import Stage
from fedgrove.tracking.callback import RunInfo
from fedgrove.training.profile import round_span, span
from fedgrove.wire.compress import passed
from fedgrove.wire.sift import not_finite, refuse_loss, sift


class TooFew(RunError):
    """A round had fewer clients than the job asks for. The run can be resumed."""


class Loop:
    """One run in progress: the server's state, the ledger, and where it is."""

    def __init__(self, stage: Stage[Engine], records: Records):
        self.prepared = stage
        self.watch = records.watch
        self.lab = records.lab
        self.out = records.out
        self.checkpoints = records.checkpoints
        self.ledger = Ledger()
        self.new: set[str] = set()  # clients that joined late and of whom no update was used yet
        #: the mean of the clients' heads, where one is kept
        self.head: Mapping[str, Tensor] | None = None
        #: (state, round, ``Method.open`` of them)
        self._opened: tuple[State, int, State] | None = None
        self.done = 0  # rounds completed
        self.choice = Choice(Rule.of(stage.parts))
        self.guard = protection(stage.job, stage.method, stage.head, records.out)
        self.shield = Shield(stage.job.defence)
        if self.checkpoints.exists():
            self._restore()
        else:
            clients = list(stage.clients.values())
            self.state = stage.method.begin(clients)
        self.started = time.perf_counter() - self.ledger.seconds["total"]

    def rounds(self) -> None:
        """All the rounds that are left, or as many as ``run.patience`` wants."""
        stage = self.prepared
        job = stage.job
        info = RunInfo(
            method=stage.called or job.method.name,
            title=f"{stage.called or stage.method.title} on {job.model.name}",
            rounds=job.run.rounds,
            clients=tuple(stage.clients),
            out=self.out,
            job=job.to_dict(),
            start_round=self.done + 1,
        )
        self.lab.truncate_after(self.done)
        self.watch.run_started(info)
        for number in range(self.done + 1, job.run.rounds + 1):
            stop_if_pressed()
            if self.choice.enough:
                return
            with round_span(number):
                self.round(number)

    def round(self, number: int) -> None:
        """Offer, train, aggregate, evaluate, checkpoint."""
        stage = self.prepared
        schedule = stage.job.run
        last = number == schedule.rounds
        for info in stage.engine.joined(number):
            self.admit(number, info)
        selected = self.select(number)
        self.watch.round_started(number, selected)
        self.lab.begin(number, self.state)
        updates: list[Update] = []
        with self.ledger.clock("training"):
            if selected:
                updates = self.collect(number, selected)
        changes = self.changes(number)
        updates = stage.attackers.spoiled(updates, changes)
        with self.ledger.clock("server"):
            updates = self.aggregate(number, updates, changes)
        if schedule.noise:  # else updates may be masked
            parts = [method_part(update) for update in updates]
            self.lab.end(self.state, parts)
        if last or number % schedule.eval_every == 0:
            lines: list[Plain] = []
            with self.ledger.clock("evaluation"):
                for split in stage.splits:
                    lines.extend(self.measured(number, split))
            self.watch.evaluated(number, lines)
            self.choice.look(number, lines, stage.clients)
        self.watch.round_done(number, self.cost())
        self.done = number
        due = last or number % schedule.checkpoint_every == 0
        if due or self.choice.kept == number or self.choice.enough:
            self.save()

    def select(self, number: int) -> list[str]:
        """Who is asked to train: by the guard's coins where privacy counts on them, else as the
        method draws.
        """
        stage = self.prepared
        available = stage.engine.available(list(stage.clients))
        self._enough(number, available, {})
        if self.guard is not None and self.guard.draws:
            return self.guard.select(number, available)
        fraction = stage.job.federation.fraction
        return stage.method.select(self.state, number, available, fraction)

    def cost(self) -> Plain:
        """What the run has cost so far, as ``round_done`` is told."""
        told: Plain = {
            "bytes_up": self.ledger.bytes_up,
            "bytes_down": self.ledger.bytes_down,
        }
        if self.guard is not None:
            clients = len(self.prepared.clients)
            told["epsilon"] = self.guard.epsilon(clients)
        return told

    def collect(self, number: int, selected: Sequence[str]) -> list[Update]:
        """The round's updates in name order; who gives none, or one that cannot be used, is left
        out and logged.
        """
        engine = self.prepared.engine
        updates: list[Update] = []
        missing: dict[str, str] = {}

        def offer(name: str) -> Tree:
            return self.offer(name, number)

        for arrival in engine.train(number, selected, offer):
            stop_if_pressed()
            if isinstance(arrival, Absence):
                missing[arrival.client] = arrival.reason
                self._absent(number, arrival)
                continue
            self.ledger.arrived(arrival)
            name = arrival.update.client
            update, wrong = self._typed(arrival.update)
            wrong = wrong or not_finite(update.content)
            if wrong:
                missing[name] = wrong
                engine.reject(name)
                self.lost(number, Absence(name, wrong))
                continue
            if arrival.round < number:
                used = f"its update of round {arrival.round} is used in this one"
                self.watch.client_event(number, name, "late", used)
            updates.append(update)
            self.watch.client_done(number, train_line(number, arrival))
        present = [update.client for update in updates]
        self._enough(number, present, missing)
        return sorted(updates, key=lambda update: update.client)

    def _absent(self, number: int, absence: Absence) -> None:
        """A client gave no update: one that has just joined fails for good where its half of the
        method did.
        """
        failed = bool(absence.trace)
        if failed and absence.client in self.new:
            self._refuse(number, absence.client, absence.reason)
        else:
            self.lost(number, absence)

    def _typed(self, update: Update) -> tuple[Update, str | None]:
        """The update with the method's part as its ``Sent``, or a clause on why it is none."""
        if "method" not in update.content:  # masked: the sum is what the method sees
            return update, None
        prepared = self.prepared
        try:
            sent = typed(prepared.method.Sent, update.content["method"])
        except AdapterError as error:
            if prepared.engine.trusted:
                raise
            return update, f"its update is not the method's: {error}"
        content = {**update.content, "method": sent}
        return replace(update, content=content), None

    def aggregate(self, number: int, updates: list[Update], changes: Changes) -> list[Update]:
        """The next state; the updates that it was made of. From clients elsewhere, one that breaks
        it is left out.
        """
        prepared = self.prepared
        seen: Sequence[Update] = ()  # what of the updates the state was made of, at the last try
        head: Mapping[str, Tensor] | None = None

        def combine(whole: Sequence[Update]) -> State:
            nonlocal seen, head
            seen = self.protected(number, whole)
            with self.shield.over(number, seen, changes) as guarded:
                parts = [method_part(update) for update in guarded]
                state = prepared.method.aggregate(self.state, number, parts)
                head = prepared.head.aggregate(self.head, guarded)
            if not prepared.engine.trusted:
                refuse_loss(self.state, state, prepared.method.setting.sites)
            return state

        masked = prepared.job.privacy.secure_aggregation
        if prepared.engine.trusted or masked:  # of a sum nobody's part can be tried without
            state = combine(updates)
            self.new -= {update.client for update in updates}
        else:
            state, faults = sift(combine, updates)
            self._reject(number, faults)
            reasons = dict(faults)
            updates = [update for update in updates if update.client not in reasons]
            present = [update.client for update in updates]
            self.new -= set(present)
            if state is None:
                present = []
            self._enough(number, present, reasons)
        if self.guard is not None:
            self.guard.released(seen[0])
        self.shield.used(updates, changes)
        self.state, self.head = state, head
        return updates

    def _reject(self, number: int, faults: Sequence[tuple[str, str]]) -> None:
        """These clients' updates broke the aggregation, each with the reason."""
        for client, reason in faults:
            self.prepared.engine.reject(client)
            if client in self.new:
                self._refuse(number, client, reason)
            else:
                self.lost(number, Absence(client, reason))

    def changes(self, number: int) -> Changes:
        """What the clients of a round changed, where somebody asks."""
        prepared, how = self.prepared, self.prepared.job.run.compress

        def received(name: str) -> Given:
            found: Given = passed(self.offer(name, number), how)
            return found

        return Changes(prepared.method, prepared.head, prepared.clients, received, number)

    def protected(self, number: int, updates: Sequence[Update]) -> Sequence[Update]:
        """What of the updates the server's half sees: all of them, or under ``[privacy] clip``
        their noisy mean.
        """
        if self.guard is None:
            return updates
        how = self.prepared.job.run.compress
        clients = self.prepared.clients

        def base(name: str) -> Tree:
            return self.offer(name, number)

        def received(name: str) -> Tree:
            found: Tree = passed(base(name), how)
            return found

        opened = None
        if self.prepared.job.privacy.secure_aggregation:
            opened = self.prepared.engine.opened(number, updates)
        mean = self.guard.combine(
            round=number,
            clients=clients,
            updates=updates,
            base=base,
            received=received,
            opened=opened,
        )
        return [mean]

    def measured(self, number: int, split: str) -> Iterator[Plain]:
        """A line of metrics for each client that answers."""
        prepared = self.prepared
        clients = self.asked(list(prepared.clients), number)

        def offer(name: str) -> Tree:
            return self.deployed(name, number)

        for found in prepared.engine.evaluate(clients, offer, split):
            stop_if_pressed()
            if isinstance(found, Absence):
                self.lost(number, found, "not evaluated")
            else:
                client, measures = found
                yield {
                    "round": number,
                    "client": client,
                    "split": split,
                    **measures,
                }

    def asked(self, clients: Sequence[str], number: int) -> list[str]:
        """Those of the clients that are measured after round ``number``."""
        run = self.prepared.job.run
        return drawn(clients, run.evaluate, run.seed, number)

    def lost(self, number: int, absence: Absence, what: str = "left out") -> None:
        """Tell the log and the watcher that a client is missing."""
        client = absence.client
        reason = absence.reason
        self.watch.client_event(number, client, what, reason, absence.trace)
        self.watch.client_lost(number, client, what, reason)

    def admit(self, number: int, info: ClientInfo) -> None:
        """A client that appeared after the first round trains from now on, if the method can place
        it.
        """
        prepared = self.prepared
        method = prepared.method
        training = list(prepared.clients.values())
        held_out = list(prepared.held_out.values())
        try:
            method.check([*training, *held_out, info])
            method.offer(self.opened(number), number, info)
        except FedgroveError as error:
            self._refuse(number, info.name, str(error))
            return
        except Exception as error:  # whatever a method does for a client that it has never seen
            self._refuse(number, info.name, f"the server's half failed on it ({error!r})")
            return
        self.new.add(info.name)
        self.choice.start_anew()
        training.append(info)
        training.sort(key=lambda each: each.name)
        prepared.clients.clear()
        for each in training:
            prepared.clients[each.name] = each
        joined = f"it trains from round {number} on"
        self.watch.client_event(number, info.name, "joined", joined)

    def _refuse(self, number: int, client: str, words: str) -> None:
        reason = f"{self.prepared.method.title} cannot take it in after the first round: {words}"
        self.prepared.clients.pop(client, None)
        self.prepared.engine.refuse(client, reason)
        self.lost(number, Absence(client, reason), "refused")

    def _enough(
        self,
        number: int,
        present: Sequence[str],
        missing: Mapping[str, str],
    ) -> None:
        least = self.prepared.job.federation.min_clients
        if len(present) >= least:
            return
        reasons = [f"{client}: {reason}" for client, reason in sorted(missing.items())]
        if reasons:
            why = f" ({'; '.join(reasons)})"
        else:
            why = ""
        raise TooFew(
            f"Round {number} has {len(present)} of the {least} clients that federation.min_clients "
            f"asks for{why}; the run is as it was after round {self.done}, go on with --resume."
        )

    def opened(self, round: int) -> State:
        """The state as the offers of a round see it, made once for all clients."""
        if self._opened is not None:
            state, when, found = self._opened
            if state is self.state and when == round:
                return found
        found = self.prepared.method.open(self.state, round)
        self._opened = (self.state, round, found)
        return found

    def offer(self, client: str, round: int) -> Tree:
        """What goes down to a client: the method's part and the head policy's."""
        prepared = self.prepared
        state = self.opened(round)
        info = prepared.clients[client]
        content = prepared.method.offer(state, round, info)
        return prepared.head.beside(content, self.head, newcomer=False)

    def deployed(self, client: str, round: int) -> Tree:
        """What a client's personal model is made of after round ``round``: the one that is
        measured, and the one that it leaves with.
        """
        prepared = self.prepared
        state = self.opened(round + 1)
        info = prepared.clients[client]
        content = prepared.method.deploy(state, round, info)
        return prepared.head.beside(content, self.head, newcomer=False)

    def save(self) -> None:
        """A checkpoint of everything, after the metrics of its rounds are on disk."""
        self.ledger.seconds["total"] = time.perf_counter() - self.started
        head = None
        if self.head:
            head = dict(self.head)
        server: Tree = {
            "state": self.state,
            "head": head,
            "ledger": dict(vars(self.ledger)),
            "engine": self.prepared.engine.notes(),
        }
        if self.guard is not None:
            server["releases"] = self.guard.releases
        if self.prepared.job.defence.active:
            server["defence"] = self.shield.notes()
        if self.choice.rule.asked:
            server["choice"] = self.choice.notes()
        kept = self.choice.kept
        if kept == self.done:
            self.prepared.engine.hold(server["engine"])
        elif not kept:
            self.prepared.engine.hold(None)
        with span("checkpoint"):
            changed = self.prepared.engine.changed()
            self.checkpoints.save(self.done, server, changed, kept=kept)

    def _restore(self) -> None:
        self.done, server, stores = self.checkpoints.load()
        self._put(server)
        self.ledger = Ledger(**server["ledger"])
        self.prepared.engine.restore(stores, server.get("engine", {}))
        if self.guard is not None:
            self.guard.releases = int(server["releases"])
        if "defence" in server:
            self.shield.restore(server["defence"])
        if self.choice.rule.asked:
            self.choice.restore(server["choice"])
        if self.choice.kept:
            held = self.checkpoints.load_server(kept=True)
            self.prepared.engine.hold(held.get("engine", {}))

    def _put(self, server: Tree) -> None:
        """The server's state out of a checkpoint."""
        self.state = typed(self.prepared.method.State, server["state"])
        self.head = server["head"]

    @property
    def leaves(self) -> int:
        """The round whose models the clients leave with."""
        return self.choice.kept or self.done

    @contextmanager
    def at_leaving(self) -> Iterator[None]:
        """Inside, the state and the clients' stores are those of the round ``leaves``."""
        if self.leaves == self.done:
            yield
            return
        engine = self.prepared.engine
        _, kept, stores = self.checkpoints.load_kept()
        self._put(kept)
        engine.go_back(stores, kept.get("engine", {}))
        try:
            yield
        finally:
            _, newest, stores = self.checkpoints.load()
            self._put(newest)
            engine.restore(stores, newest.get("engine", {}))


def method_part(update: Update) -> Update:
    """The update as the method's server half sees it: without the head policy's part."""
    return replace(update, content=update.content["method"])


def train_line(number: int, arrival: Arrival) -> Plain:
    return {
        "round": number,
        "client": arrival.update.client,
        "split": "train",
        "loss": arrival.loss,
        "examples": arrival.update.examples,
        "steps": arrival.steps,
        "bytes_up": arrival.bytes_up,
        "bytes_down": arrival.bytes_down,
        "seconds": round(arrival.seconds, 4),
    }
