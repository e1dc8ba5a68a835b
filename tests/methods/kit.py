"""What the tests of the personal methods share: settings, random adapters, stopped runs, reloaded
models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stops import StopAfter
from tests.tiny import sentences, tiny_job
from torch import Tensor

import fedgrove as fg
from fedgrove.adapters.adapter import Adapter, Factors, Site
from fedgrove.adapters.assembly import Assembly, Mix, sealed, unsealed
from fedgrove.adapters.private import PrivacyError, is_private, seal, unseal
from fedgrove.adapters.tree import leaves, numbers, pack, typed, unpack
from fedgrove.engines.local import prepare
from fedgrove.job import Job
from fedgrove.methods import protocols
from fedgrove.methods.contract import (
    ClientInfo,
    Live,
    Method,
    Plan,
    Setting,
    Step,
    Trained,
    Update,
    WeightedOptions,
)
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.registry import method_class
from fedgrove.start import run
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.tracking.metrics import read
from fedgrove.training.client import ClientHalf, ClientRound, carry

#: Four layers of two sites, of unlike sizes.
SITES = {
    f"layer.{layer}.{kind}": Site(
        f"layer.{layer}.{kind}", layer, 5 + layer, 7 if kind == "query" else 4
    )
    for layer in range(4)
    for kind in ("query", "value")
}
HIDDEN, LAYERS = 32, 2
#: Numbers of one adapter of rank 1 on the tiny model: query and value of each layer, A and B.
PER_RANK = LAYERS * 2 * 2 * HIDDEN


def setting(**changes: Any) -> Setting:
    values: dict[str, Any] = {"sites": SITES, "rank": 3, "alpha": 6.0, "rounds": 6, "seed": 3}
    return Setting(**{**values, **changes})


def method(name: str, *, rounds: int = 6, rank: int = 3, **options: Any) -> Any:
    chosen = method_class(name)
    return chosen(chosen.Options(**options), setting(rounds=rounds, rank=rank))


def adapter(
    seed: int, rank: int = 3, scale: float = 2.0, size: float = 1.0, sites: Any = None
) -> Adapter:
    """Random factors in float64; ``size`` scales B."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, site.in_features, generator=rng, dtype=torch.float64),
            size * torch.randn(site.out_features, rank, generator=rng, dtype=torch.float64),
            scale,
        )
        for name, site in (sites or SITES).items()
    }


def info(name: str, rank: int = 3, examples: int = 10) -> ClientInfo:
    return ClientInfo(name, rank, examples)


def update(name: str, examples: int, **content: Any) -> Update:
    return Update(name, examples, content)


def aggregated(method: Method, state: Any, round: int, updates: Sequence[Update]) -> Any:
    """The next state, with state and contents as the loop hands them over: of the method's kinds."""
    known = typed(method.State, state)
    arrived = [replace(each, content=typed(method.Sent, each.content)) for each in updates]
    return method.aggregate(known, round, arrived)


def offered(method: Method, state: Any, round: int, client: ClientInfo) -> Any:
    """A client's offer, from the state as the loop opens it for the round."""
    return method.offer(method.open(typed(method.State, state), round), round, client)


def welcomed(method: Method, state: Any, client: ClientInfo, probe: Any = None) -> Any:
    """A newcomer's offer after the last round."""
    opened = method.open(typed(method.State, state), method.setting.rounds + 1)
    return method.welcome(opened, client, probe)


def fedit_mean(updates: Sequence[Update], weights: str = "examples") -> Adapter:
    """FedIT's mean of the updates' adapters, which many rules are in a special case."""
    options = WeightedOptions.model_validate({"weights": weights})
    sites = {}
    for name, f in updates[0].content["adapter"].items():
        sites[name] = Site(name, 0, f.A.shape[1], f.B.shape[0])
    method = FedIT(options, setting(sites=sites))
    found: Adapter = aggregated(method, {"whole": {}}, 1, updates).whole
    return found


def near(one: Adapter, other: Adapter) -> None:
    assert list(one) == list(other)
    for site in one:
        torch.testing.assert_close(one[site].A, other[site].A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one[site].B, other[site].B, rtol=1e-12, atol=1e-12)
        assert one[site].scale == other[site].scale


def same(one: Adapter, other: Adapter) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[s].A, other[s].A) and torch.equal(one[s].B, other[s].B) for s in one
    )


# ------------------------------------------------------------ runs
def files(path: Path) -> dict[str, bytes]:
    found = sorted(
        f for f in path.rglob("*") if f.is_file() and "adapters" in str(f.relative_to(path))
    )
    return {str(f.relative_to(path)): f.read_bytes() for f in found if f.name != "measures.json"}


def weights(path: Path) -> dict[str, bytes]:
    """The exported tensors and PEFT's own configuration, without our card, which names the
    method.
    """
    return {name: data for name, data in files(path).items() if not name.endswith("fedgrove.json")}


def lines(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    found = read(path / "metrics.jsonl")
    return [
        {k: v for k, v in x.items() if k != "seconds"} for x in found if split in (None, x["split"])
    ]


def summary(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "summary.json").read_text())
    del content["seconds"]
    return content


def resumes(
    bert: Path, silos: Path, tmp: Path, stops: Sequence[tuple[int, int]], **job: Any
) -> None:
    """A run at fraction 0.7 that is stopped and resumed is bit-identical to one never stopped."""
    job.setdefault("federation", {})["fraction"] = 0.7
    job.setdefault("train", {})["final_local_epochs"] = 1
    made = tiny_job(bert, silos, **job)
    run(made, tmp / "whole")
    for round, clients in stops:
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp / "cut", resume=True, callbacks=[StopAfter(round, clients)])
    run(made, tmp / "cut", resume=True)
    assert files(tmp / "whole") == files(tmp / "cut")
    assert summary(tmp / "whole") == summary(tmp / "cut")
    assert lines(tmp / "whole") == lines(tmp / "cut")
    assert lines(tmp / "whole", "train")


def equal_runs(
    bert: Path, silos: Path, tmp: Path, ours: dict[str, Any], other: dict[str, Any], **job: Any
) -> None:
    """Two methods give the same adapters, heads, measures and costs."""
    for name, chosen in (("ours", ours), ("other", other)):
        run(tiny_job(bert, silos, method=chosen, **job), tmp / name)
    assert len(weights(tmp / "ours")) >= 6
    assert weights(tmp / "ours") == weights(tmp / "other")
    assert lines(tmp / "ours") == lines(tmp / "other")
    for key in ("bytes", "parameters", "clients"):
        assert summary(tmp / "ours")[key] == summary(tmp / "other")[key]


class Wire:
    """Everything that a run sends, and every number that it must not."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.private: set[bytes] = set()
        self.kept: list[Any] = []

    def leaks(self) -> bool:
        sent = {
            t.detach().contiguous().numpy().tobytes()
            for _, tree in self.sent
            for _, t in leaves(tree)
        }
        return bool(sent & self.private)


def watched(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Record offers, updates and stores of the clients; each must be packable as it is sent."""
    wire = Wire()
    usual = ClientHalf.train_together

    def train(self: ClientHalf, turns: Sequence[ClientRound], round: int) -> Any:
        outcomes = usual(self, turns, round)
        for turn, outcome in zip(turns, outcomes, strict=True):
            for direction, tree in (
                ("down", dict(turn.offer)),
                ("up", dict(outcome.update.content)),
            ):
                pack(tree)
                wire.sent.append((direction, tree))
            wire.kept.append(outcome.store["mine"])
            for _, tensor in leaves(outcome.store["mine"]):
                if is_private(tensor):
                    with torch._C.DisableTorchFunctionSubclass():
                        wire.private.add(tensor.as_subclass(Tensor).contiguous().numpy().tobytes())
        return outcomes

    monkeypatch.setattr(ClientHalf, "train_together", train)
    return wire


def refuses_to_send(mine: Any) -> None:
    with pytest.raises(PrivacyError):
        pack({"mine": mine})


def sent(path: Path, client: str) -> list[tuple[int, int]]:
    """(bytes up, bytes down) of each of the client's rounds."""
    return [(x["bytes_up"], x["bytes_down"]) for x in lines(path, "train") if x["client"] == client]


class Opened:
    """A finished run's last state and stores on a fresh engine."""

    def __init__(self, job: Job, path: Path):
        self.prepared = prepare(job)
        _, server, stores = Checkpoints(path / "checkpoints").load()
        self.state, self.stores = typed(self.prepared.method.State, server["state"]), stores
        self.prepared.engine.restore(stores)
        self.rows = sentences(9, seed=5)
        self.examples = self.prepared.task.encode(self.rows, self.prepared.base.processor)

    @property
    def method(self) -> Method:
        return self.prepared.method

    def assembly(self, name: str) -> Any:
        rounds = self.prepared.job.run.rounds
        client = self.prepared.clients[name]
        state = self.method.open(self.state, rounds + 1)
        offer = {"method": self.method.deploy(state, rounds, client)}
        return self.prepared.engine.personal(name, offer)

    def logits(self, assembly: Any) -> Tensor:
        return self.prepared.engine.half.kernel.logits(assembly, self.examples)


def exports(
    bert: Path, silos: Path, tmp: Path, check: Callable[[Any], None] | None = None, **job: Any
) -> Opened:
    """The adapter directory of each client computes the run's logits and measures; gives back the
    opened run.
    """
    made = tiny_job(bert, silos, **job)
    found = run(made, tmp / "out")
    opened = Opened(made, found.path)
    for name in found.names():
        assembly = opened.assembly(name)
        if check is not None:
            check(assembly)
        got = fg.load(found.client(name).path).logits([row["text"] for row in opened.rows])
        torch.testing.assert_close(got, opened.logits(assembly), rtol=0, atol=1e-5)
        assert numbers({"logits": got}) == 2 * len(opened.rows)
        assert found.client(name).evaluate()["accuracy"] == found.summary["clients"][name]["metric"]
    return opened


# ------------------------------------------------------------ what every method must be
def satisfies(kind: type[Method], *, rounds: int = 4, **options: Any) -> None:
    """Play a small federation with a method, without a model, and check all that the contract and
    the protocols that it claims promise. For a method of any package:

        def test_my_method() -> None:
            satisfies(MyMethod)
    """
    Play(kind(kind.Options(**options), setting(rounds=rounds, rank=3))).all()


def there_and_back(kind: type, tree: Any, *, private: bool = False) -> Any:
    """What the other side makes of a tree: it has the same bytes, and is of the method's kind."""
    blob = pack(tree, private=private)
    back: Any = typed(kind, unpack(blob))
    assert isinstance(back, kind), f"a {kind.__name__} was said, not a {type(back).__name__}"
    assert pack(back, private=private) == blob, f"not every field of {kind.__name__} travels"
    return back


def worked(plan: Plan, seed: int) -> list[Trained]:
    """A plan's steps as if they had trained: what trains moves by a little noise, what stays with
    the client comes back sealed.
    """
    rng = torch.Generator().manual_seed(seed)
    steps: Generator[Step, Any, None] = (
        plan if isinstance(plan, Generator) else (step for step in plan)
    )
    done: list[Trained] = []
    step = next(steps, None)
    while step is not None:
        done.append(_trained(carry(step, done), rng))
        try:
            step = steps.send(done[-1])
        except StopIteration:
            step = None
    return done


def _trained(step: Step, rng: torch.Generator) -> Trained:
    def moved(value: Tensor) -> Tensor:
        plain = unseal(value)
        return plain + 0.1 * torch.randn(plain.shape, generator=rng, dtype=plain.dtype)

    if step.measure == "features":
        return Trained(step.assembly, math.nan, 0, features=torch.rand(step.count or 5, 8))
    if step.measure == "fisher":
        scores = {
            term.name: {
                site: f.map(lambda value: moved(value) ** 2) for site, f in term.adapter.items()
            }
            for term in step.assembly.terms
        }
        return Trained(step.assembly, 0.5, 0, scores=scores)
    terms = []
    for term in step.assembly.terms:
        adapter = {}
        for site, f in term.adapter.items():
            A = moved(f.A) if "A" in term.train else f.A
            B = moved(f.B) if "B" in term.train else f.B
            adapter[site] = Factors(A, B, f.scale)
        diagonal = term.diagonal
        if diagonal is not None and "D" in term.train:
            diagonal = {site: moved(value) for site, value in diagonal.items()}
        terms.append(replace(term, adapter=sealed(adapter, term.private), diagonal=diagonal))
    extras = {}
    for name, extra in step.assembly.extras.items():
        value = moved(extra.value) if extra.train else extra.value
        extras[name] = replace(extra, value=seal(value) if extra.home == "client" else value)
    return Trained(replace(step.assembly, terms=tuple(terms), extras=extras), 0.5, 2)


class Play:
    """A federation of four clients and a newcomer, played round by round."""

    def __init__(self, method: Method):
        self.method = method
        ranks = (3, 1, 2, 3) if method.ranks == "mixed" else (3, 3, 3, 3)
        self.clients = [info(f"c{n}", rank, 10 * (n + 1)) for n, rank in enumerate(ranks)]
        self.newcomer = info("newcomer", 3, 25)
        self.stores: dict[str, bytes] = {}

    def all(self) -> None:
        method = self.method
        self.identity()
        method.check(self.clients)
        self.state = there_and_back(method.State, method.begin(self.clients))
        for round in range(1, method.setting.rounds + 1):
            self.round(round)
            for client in self.clients:
                self.personal(client, round)
            self.welcome()
        self.artefacts()

    def identity(self) -> None:
        method = self.method
        words = (
            method.name,
            method.title,
            method.paper,
            method.trains,
            method.shares,
            method.keeps,
        )
        assert all(isinstance(each, str) and each for each in words)
        assert method.ranks in ("equal", "mixed")
        assert isinstance(typed(method.Mine, {}), method.Mine)  # before the first round
        for kind in (method.State, method.Offer, method.Mine, method.Sent, method.Probed):
            record = kind is not dict
            assert not record or is_dataclass(kind)
            assert not record or kind.__dataclass_params__.frozen, f"{kind} can change"
        assert all(isinstance(name, str) for name in protocols.tiers(method))
        assert all(issubclass(mix, Mix) for mix in protocols.mixes(type(method)))
        for said in (protocols.needs_each(method), protocols.reads(method)):
            assert isinstance(said, str)

    def round(self, number: int) -> None:
        method, by_name = self.method, {client.name: client for client in self.clients}
        before = pack(self.state)
        opened = method.open(self.state, number)
        chosen = method.select(self.state, number, list(by_name), 1.0)
        assert chosen
        assert set(chosen) <= set(by_name)
        updates, offers = [], []
        for name in sorted(chosen):
            client = by_name[name]
            offers.append(there_and_back(method.Offer, method.offer(opened, number, client)))
            updates.append(self.work(client, offers[-1], number))
        self.sums(updates, offers)
        self.lab(updates)
        after = method.aggregate(self.state, number, updates)
        assert pack(self.state) == before, "aggregate or an offer changed the state in its hands"
        self.state = there_and_back(method.State, after)

    def work(self, client: ClientInfo, offer: Any, number: int) -> Update:
        method, mine = self.method, self.mine(client)
        steps = worked(method.plan(client, offer, mine, number), number)
        content, kept = method.report(client, steps, offer, mine, number)
        sent = there_and_back(method.Sent, content)  # refuses what is private
        there_and_back(method.Mine, kept, private=True)
        self.stores[client.name] = pack(kept, private=True)
        return Update(client.name, client.examples, sent, client.rank)

    def mine(self, client: ClientInfo) -> Any:
        stored = self.stores.get(client.name)
        return typed(self.method.Mine, {} if stored is None else unpack(stored))

    def sums(self, updates: Sequence[Update], offers: Sequence[Any]) -> None:
        """Where a sum is enough, all clients' updates have one shape."""
        if protocols.needs_each(self.method) or not self.method.federated:
            return
        pairs = zip(updates, offers, strict=True)
        added = [protocols.addend(self.method, each.content, offer) for each, offer in pairs]
        shapes = {str([(path, tuple(t.shape)) for path, t in leaves(each)]) for each in added}
        assert len(shapes) == 1
        if isinstance(self.method, protocols.Counted):
            counts = self.method.divisors([update.content for update in updates])
            assert all(bool((each >= 1).all()) for _, each in leaves(counts))

    def lab(self, updates: Sequence[Update]) -> None:
        """The weights of the mean add up to one, and each module has an index."""
        if any(True for each in updates for _ in leaves(each.content)):
            weights = protocols.weights(self.method, updates)
            assert len(weights) == len(updates)
            assert sum(weights) == pytest.approx(1.0)
        if not isinstance(self.method, protocols.Modular):
            return
        for each in updates:
            modules, indices = self.method.modules(each)
            for site, factors in modules.items():
                here = indices.get(site) if isinstance(indices, Mapping) else indices
                assert here is None or len(here) == factors.rank

    def personal(self, client: ClientInfo, round: int) -> None:
        opened = self.method.open(self.state, round + 1)
        offer = self.method.deploy(opened, round, client)
        self.runs(client, there_and_back(self.method.Offer, offer), self.mine(client))

    def runs(self, client: ClientInfo, offer: Any, mine: Any) -> None:
        """The personal model fits the base, and its penalty is a finite number."""
        assembly, sites = self.method.personal(client, offer, mine), self.method.setting.sites
        for term in assembly.terms:
            for site, f in term.adapter.items():
                assert f.A.shape == (f.rank, sites[site].in_features)
                assert f.B.shape == (sites[site].out_features, f.rank)
        if isinstance(self.method, protocols.Penalised):
            penalty = self.method.penalty(client, offer, mine)
            terms = {term.name: unsealed(term.adapter) for term in assembly.terms}
            extras = {name: unseal(extra.value) for name, extra in assembly.extras.items()}
            assert penalty is None or math.isfinite(float(penalty(Live(terms, extras))))

    def welcome(self) -> None:
        """A newcomer runs what it is given at once, and what its probe's report brings."""
        method, client = self.method, self.newcomer
        opened = method.open(self.state, method.setting.rounds + 1)
        offer = there_and_back(method.Offer, method.welcome(opened, client, None))
        self.runs(client, offer, typed(method.Mine, {}))
        plan = method.probe(client, offer) if isinstance(method, protocols.Probes) else None
        if plan is None or not isinstance(method, protocols.Probes):
            return
        report = method.probe_report(client, worked(plan, 7), offer)
        told = there_and_back(method.Probed, report)
        placed = there_and_back(method.Offer, method.welcome(opened, client, told))
        self.runs(client, placed, typed(method.Mine, {}))
        assert isinstance(protocols.placed(placed), str)

    def artefacts(self) -> None:
        """Plain data that JSON can hold; a global model, where there is one."""
        method, rounds = self.method, self.method.setting.rounds
        if isinstance(method, protocols.ServerArtefacts):
            json.dumps(method.artefacts(self.state), allow_nan=False)
        if isinstance(method, protocols.ClientArtefacts):
            opened = method.open(self.state, rounds + 1)
            for client in self.clients:
                offer = method.deploy(opened, rounds, client)
                json.dumps(method.client_artefacts(client, offer, self.mine(client)))
        model = protocols.global_assembly(method, self.state)
        assert model is None or isinstance(model, Assembly)
