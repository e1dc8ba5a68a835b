"""What the tests of the personal methods share: settings, random adapters, stopped runs, reloaded
models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sentences, tiny_job
from torch import Tensor

import fedgrove as fg
from fedgrove.adapters.adapter import Adapter, Factors, Site
from fedgrove.adapters.private import PrivacyError, is_private
from fedgrove.adapters.tree import leaves, numbers, pack, typed
from fedgrove.job import Job
from fedgrove.methods.contract import ClientInfo, Method, Setting, Update, WeightedOptions
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.registry import method_class
from fedgrove.runs.prepare import prepare
from fedgrove.start import run
from fedgrove.tracking.callback import Callback
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.tracking.metrics import read
from fedgrove.training.client import ClientHalf, Turn

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
    found: Adapter = aggregated(FedIT(options, setting()), {"whole": {}}, 1, updates).whole
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
class StopAfter(Callback):
    def __init__(self, round: int, clients: int):
        self.round, self.clients, self.seen = round, clients, 0

    def client_done(self, round: int, line: Any) -> None:
        self.seen += round == self.round
        if self.seen == self.clients:
            raise KeyboardInterrupt


def files(path: Path) -> dict[str, bytes]:
    found = sorted(
        f for f in path.rglob("*") if f.is_file() and "adapters" in str(f.relative_to(path))
    )
    return {str(f.relative_to(path)): f.read_bytes() for f in found}


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

    def train(self: ClientHalf, turns: Sequence[Turn], round: int) -> Any:
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
        offer = {"method": offered(self.method, self.state, rounds + 1, client)}
        return self.prepared.engine.personal(name, offer)

    def logits(self, assembly: Any) -> Tensor:
        return self.prepared.half.kernel.logits(assembly, self.examples)


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
