"""FedTreeLoRA in whole runs on the tiny model: the identity with FedIT, resume, what travels,
artefacts, export.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stops import StopAfter
from tests.tiny import save_bert, save_silos, sentences, tiny_job

import fedgrove as fg
from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.tree import pack, typed
from fedgrove.engines.local import prepare
from fedgrove.job import Job
from fedgrove.methods.contract import ClientInfo, reveal
from fedgrove.methods.fedtreelora import FedTreeLoRA, TreeState
from fedgrove.start import run
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.tracking.metrics import read
from fedgrove.training.client import ClientHalf, ClientRound

LAYERS, HIDDEN, RANK = 3, 32, 4
FACTORS = 2 * 2 * RANK * HIDDEN  # numbers of A and B at a layer's two sites


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "three-layers", layers=LAYERS)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("data") / "five", clients=5)


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sites of two kinds that disagree on every label: even ones call good what odd ones call
    bad.
    """
    folder = tmp_path_factory.mktemp("data") / "kinds"
    folder.mkdir()
    other = {"positive": "negative", "negative": "positive"}
    for index in range(6):
        rows = sentences(40, seed=50 + index)
        if index % 2:
            rows = [{**row, "label": other[row["label"]]} for row in rows]
        (folder / f"site-{index}.jsonl").write_text(
            "\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8"
        )
    return folder


def weights(path: Path) -> dict[str, bytes]:
    kept = ("adapter_model.safetensors", "adapter_config.json", "head.safetensors")
    files = sorted(file for file in (path / "adapters").rglob("*") if file.name in kept)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def tree_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "tree.json").read_text())
    return content


def job_of(bert: Path, data: Path, /, rounds: int = 3, **changes: Any) -> Job:
    own = changes.pop("method", {})
    method = {"name": "fedtreelora", "tau": -1.0, **own}
    job: Job = tiny_job(bert, data, method=method, run={"rounds": rounds}, **changes)
    return job


@pytest.mark.parametrize("shares", ["uniform", "examples"])
def test_one_branch_without_warm_up_is_fedit_bit_for_bit(
    shares: str, bert: Path, five: Path, tmp_path: Path
) -> None:
    ours = run(
        job_of(bert, five, method={"K": 1, "warmup_rounds": 0, "weights": shares}),
        tmp_path / "ours",
    )
    fedit = run(
        tiny_job(bert, five, method={"name": "fedit", "weights": shares}), tmp_path / "fedit"
    )
    found = weights(tmp_path / "ours")
    assert len(found) == 3 * 6  # five clients and _global
    assert found == weights(tmp_path / "fedit")
    assert ours.summary["bytes"] == fedit.summary["bytes"]
    assert ours.summary["parameters"] == fedit.summary["parameters"]
    assert ours.summary["clients"] == fedit.summary["clients"]
    more = run(job_of(bert, five, method={"weights": shares}), tmp_path / "split")
    assert weights(more.path) != found


def miss_the_warm_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    usual = FedTreeLoRA.select

    def select(
        self: FedTreeLoRA, state: Any, round: int, available: Any, fraction: float
    ) -> list[str]:
        chosen = usual(self, state, round, available, fraction)
        return [each for each in chosen if round > self.warmup or each != name]

    monkeypatch.setattr(FedTreeLoRA, "select", select)


def test_a_resumed_run_is_bit_identical_with_absent_and_late_clients_and_a_new_tree(
    bert: Path, five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miss_the_warm_up(monkeypatch, "site-3")
    job = job_of(
        bert, five, rounds=6, method={"warmup_rounds": 2, "rebuild_every": 2}, federation={"fraction": 0.8},
        train={"final_local_epochs": 1},
    )  # fmt: skip
    whole = run(job, tmp_path / "whole")
    for stop in (StopAfter(2, 1), StopAfter(3, 2), StopAfter(4, 4), StopAfter(6, 3)):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[stop])
    run(job, tmp_path / "cut", resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    assert tree_of(tmp_path / "whole") == tree_of(tmp_path / "cut")
    assert len(tree_of(whole.path)["clients"]) == 5
    lines = [
        [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in read(path / "metrics.jsonl")
        ]
        for path in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert lines[0] == lines[1]


def test_a_late_client_joins_the_run(
    bert: Path, two_kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miss_the_warm_up(monkeypatch, "site-3")
    method = {"warmup_rounds": 2, "K": 2}
    run(
        job_of(bert, two_kinds, rounds=4, method=method, train={"local_steps": 6}), tmp_path / "out"
    )
    tree = tree_of(tmp_path / "out")
    assert tree["clients"] == ["site-0", "site-1", "site-2", "site-4", "site-5"]
    assert tree["joined"] == ["site-3"]
    assert ["site-1", "site-3", "site-5"] in [
        sorted(group) for group in tree["layers"][0]["groups"]
    ]
    lines = {
        (line["client"], line["round"]): line
        for line in read(tmp_path / "out" / "metrics.jsonl")
        if line["split"] == "train"
    }
    assert ("site-3", 2) not in lines
    assert lines["site-3", 3]["bytes_down"] == 0
    assert lines["site-3", 3]["bytes_up"] == 4 * FACTORS * LAYERS // 2
    assert lines["site-3", 3]["steps"] == 2 * lines["site-2", 3]["steps"]
    assert lines["site-3", 4]["bytes_up"] == lines["site-2", 4]["bytes_up"]


def test_clients_that_are_two_kinds_are_told_apart(
    bert: Path, two_kinds: Path, tmp_path: Path
) -> None:
    found = run(
        job_of(bert, two_kinds, rounds=6, method={"tau": 0.1, "K": 2}, train={"local_steps": 6}),
        tmp_path / "tree",
    )
    groups = tree_of(found.path)["layers"][-1]["groups"]
    even = {"site-0", "site-2", "site-4"}
    assert all(set(group) <= even or not set(group) & even for group in groups)
    assert len(groups) == 2


def test_what_travels_is_what_the_cuts_need(bert: Path, five: Path, tmp_path: Path) -> None:
    found = run(job_of(bert, five, rounds=5, method={"warmup_rounds": 2, "K": 2}), tmp_path / "out")
    tree = tree_of(found.path)
    split = sum(layer["count"] > 1 for layer in tree["layers"])
    assert split == LAYERS
    lines = {
        (line["client"], line["round"]): line
        for line in found.metrics()
        if line["split"] == "train"
    }
    whole = FACTORS * LAYERS
    for name in tree["clients"]:
        sent = [
            (lines[name, number]["bytes_up"], lines[name, number]["bytes_down"])
            for number in range(1, 6)
        ]
        down = 4 * (whole + FACTORS * split)
        assert sent == [(0, 0), (4 * whole, 0), *[(4 * whole, down)] * 3]
    head = 2 * HIDDEN + 2
    assert found.summary["parameters"]["trained"] == whole + split + head
    assert found.summary["parameters"]["stored"] == 2 * whole + split + head


def test_nothing_that_an_engine_sends_holds_a_lambda(
    bert: Path, five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    secrets: set[bytes] = set()
    usual = ClientHalf.train_together

    def train(self: ClientHalf, turns: Sequence[ClientRound], round: int) -> Any:
        outcomes = usual(self, turns, round)
        for turn, outcome in zip(turns, outcomes, strict=True):
            sent.extend([pack(dict(turn.offer)), pack(dict(outcome.update.content))])
            for logit in reveal(outcome.store["mine"].logits).values():
                secrets.update({logit.numpy().tobytes(), torch.sigmoid(logit).numpy().tobytes()})
        return outcomes

    monkeypatch.setattr(ClientHalf, "train_together", train)
    run(job_of(bert, five, federation={"head": "shared"}), tmp_path / "out")
    _, server, stores = Checkpoints(tmp_path / "out" / "checkpoints").load()
    sent.append(pack(server))
    assert len(secrets) == 2 * 5 * LAYERS * 2
    assert not any(b"lambda" in blob for blob in sent)
    words = {blob[at : at + 4] for blob in sent for at in range(0, len(blob) - 3, 4)}
    assert not secrets & words
    own = b"".join(pack(store, private=True) for store in stores.values())
    assert any(secret in own for secret in secrets)


def test_tree_json_is_filled_by_the_clients_of_a_simulation(
    bert: Path, five: Path, tmp_path: Path
) -> None:
    found = run(job_of(bert, five, rounds=2, method={"lambda_lr": 20.0}), tmp_path / "out")
    tree = tree_of(found.path)
    assert list(tree["lambda"]) == ["0", "1", "2"]
    for layer in tree["layers"]:
        assert sorted(name for group in layer["groups"] for name in group) == tree["clients"]
        assert len(layer["groups"]) == layer["count"]
        values = tree["lambda"][str(layer["layer"])]
        assert set(values) == set(tree["clients"])
        assert all(0 < value < 1 and abs(value - 0.5) > 1e-4 for value in values.values())
    still = run(job_of(bert, five, rounds=2, method={"lambda_lr": 0.0}), tmp_path / "still")
    assert {
        value for layer in tree_of(still.path)["lambda"].values() for value in layer.values()
    } == {0.5}
    slow = run(job_of(bert, five, rounds=2, method={"lambda_lr": 1.0}), tmp_path / "slow")

    def far(path: Path) -> float:
        return math.fsum(
            abs(v - 0.5) for layer in tree_of(path)["lambda"].values() for v in layer.values()
        )

    assert far(found.path) > 4 * far(slow.path) > 0


def test_the_exported_adapter_is_the_personal_model(bert: Path, five: Path, tmp_path: Path) -> None:
    job = job_of(bert, five)
    found = run(job, tmp_path / "out")
    prepared = prepare(job)
    _, server, stores = Checkpoints(tmp_path / "out" / "checkpoints").load()
    prepared.engine.restore(stores)
    rows = sentences(12, seed=3)
    examples = prepared.task.encode(rows, prepared.base.processor)
    for name in ("site-0", "site-4"):
        offer = {
            "method": prepared.method.offer(
                typed(TreeState, server["state"]), 5, prepared.clients[name]
            )
        }
        assembly = prepared.engine.personal(name, offer)
        assert [term.name for term in assembly.terms] == ["cluster", "external"]
        want = prepared.engine.half.kernel.logits(assembly, examples)
        got = fg.load(found.client(name).path).logits([row["text"] for row in rows])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_an_unseen_client_is_placed_by_a_probe_on_its_own_data(
    bert: Path, two_kinds: Path, tmp_path: Path
) -> None:
    """The probe's steps on a real model bring a held-out client to its own kind."""
    job = job_of(
        bert, two_kinds, rounds=6, method={"tau": 0.1, "K": 2},
        federation={"held_out": ["site-4", "site-5"]}, train={"local_steps": 6},
    )  # fmt: skip
    run(job, tmp_path / "out")
    _, server, _ = Checkpoints(tmp_path / "out" / "checkpoints").load()
    prepared = prepare(job)
    method, state = prepared.method, typed(TreeState, server["state"])
    for name, twin in (("site-4", "site-0"), ("site-5", "site-1")):
        newcomer = prepared.held_out[name]
        at_once = method.welcome(state, newcomer, None)

        def ask(probe: Any, newcomer: ClientInfo = newcomer) -> dict[str, Any]:
            return {"method": method.welcome(state, newcomer, probe)}

        placed = prepared.engine.half.arrive(newcomer, prepared.engine.data[name]["train"], ask)[
            "method"
        ]
        assert same(placed.cluster, method.offer(state, 7, prepared.clients[twin]).cluster)
        assert not same(placed.cluster, at_once.cluster)


def same(one: Adapter, other: Adapter) -> bool:
    return all(
        torch.equal(one[site].B, other[site].B) and torch.equal(one[site].A, other[site].A)
        for site in one
    )
