"""HiLoRA on the tiny model: resumed runs, what the engine sends, tiers as adapters, newcomers,
planted groups.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stops import StopAfter
from tests.tiny import FILLER, save_silos, tiny_job

from fedgrove.adapters import Assembly
from fedgrove.adapters.private import unseal
from fedgrove.adapters.tree import leaves, numbers, pack, typed, unpack
from fedgrove.cli import main
from fedgrove.engines.local import LocalEngine, prepare
from fedgrove.federation import build
from fedgrove.federation.tasks import ClassifyText
from fedgrove.ground.errors import JobError, RunError
from fedgrove.interop.peft import read_adapter
from fedgrove.methods.hilora import HiLoRAState
from fedgrove.runs.engine import Arrival
from fedgrove.start import run
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.tracking.metrics import read
from fedgrove.use.adapt import adapt
from fedgrove.use.personal import load
from fedgrove.use.result import Result

HILORA = {"name": "hilora"}


def files(path: Path) -> dict[str, bytes]:
    wanted = [*path.glob("adapters*/**/*"), path / "clusters.json"]
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(wanted) if f.is_file()}


def summary(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "summary.json").read_text())
    del content["seconds"]
    return content


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("hilora") / "silos", clients=6, rows=20)


class Wire:
    """Everything that the engine sends, encoded as it would be, and every private store after each
    client's round.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.down: list[tuple[int, str, bytes]] = []
        self.up: list[tuple[int, str, bytes]] = []
        self.leaves: set[bytes] = set()
        train, wire = LocalEngine.train, self

        def watched(
            engine: LocalEngine, round: int, clients: Sequence[str], offer: Any
        ) -> Iterator[Arrival]:
            def given(name: str) -> Mapping[str, Any]:
                content: dict[str, Any] = dict(offer(name))
                wire.down.append((round, name, pack(content)))
                return content

            for arrival in train(engine, round, clients, given):
                name = arrival.update.client
                wire.up.append((round, name, pack(dict(arrival.update.content))))
                leaf = engine.store(name)["mine"].leaf or {}
                wire.leaves |= {unseal(tensor).numpy().tobytes() for _, tensor in leaves(leaf)}
                yield arrival

        patch.setattr(LocalEngine, "train", watched)

    def sizes(self, client: str) -> dict[str, list[int]]:
        """Numbers of the method's part, by round."""
        return {
            way: [numbers(unpack(blob)["method"]) for _, name, blob in blobs if name == client]
            for way, blobs in (("up", self.up), ("down", self.down))
        }


@pytest.fixture(scope="module")
def finished(
    tiny_bert: Path, sites: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Wire]:
    """Five rounds (2 + 2 + 1) of six clients, one held out; and what was sent."""
    out = tmp_path_factory.mktemp("runs") / "hilora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fedgrove.runs.finish.write_report",
            lambda path, _: (path / "report.html").write_text("-"),
        )
        wire = Wire(patch)
        changes: Any = {
            "federation": {"held_out": ["site-1"]},
            "run": {"rounds": 5},
            "train": {"final_local_epochs": 1},
        }
        run(tiny_job(tiny_bert, sites, method=HILORA, **changes), out)
    return out, wire


def test_no_leaf_travels_and_silence_is_silence(finished: tuple[Path, Wire]) -> None:
    out, wire = finished
    assert len(wire.leaves) == 5 * 4 * 2  # clients, sites, factors
    sent = b"".join(blob for *_, blob in [*wire.up, *wire.down])
    assert not any(leaf in sent for leaf in wire.leaves)
    _, server, stores = Checkpoints(out / "checkpoints").load()
    root = server["state"]["root"]
    for _, tensor in leaves(root):
        assert tensor.numpy().tobytes() in sent  # the search finds what did travel
    state = pack(server)
    for store in stores.values():
        for _, tensor in leaves(store["mine"]["leaf"]):
            assert unseal(tensor).numpy().tobytes() not in state
    tier = 4 * 4 * (32 + 32)
    assert wire.sizes("site-0") == {"up": [tier] * 4 + [0], "down": [0, tier, tier, tier, tier]}
    head = 2 * 32 + 2
    lines = [
        line
        for line in read(out / "metrics.jsonl")
        if line["split"] == "train" and line["client"] == "site-0"
    ]
    assert [line["bytes_up"] for line in lines] == [4 * (tier + head)] * 4 + [4 * head]
    assert [line["bytes_down"] for line in lines] == [0, *[4 * tier] * 4]


def test_without_held_out_clients_a_leaf_round_sends_nothing_at_all(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    result = run(tiny_job(tiny_bert, silos, method=HILORA, run={"rounds": 4}), tmp_path / "out")
    last = [line for line in result.metrics() if line["split"] == "train" and line["round"] == 4]
    assert [line["bytes_up"] for line in last] == [0, 0, 0]
    assert (tmp_path / "out" / "clusters.json").is_file()


def test_a_resumed_run_is_the_same_with_late_clients_and_newcomers(
    tiny_bert: Path, sites: Path, tmp_path: Path
) -> None:
    changes: Any = {
        "federation": {"fraction": 0.5, "held_out": ["site-2"]},
        "train": {"final_local_epochs": 1},
    }
    job = tiny_job(
        tiny_bert, sites, method={**HILORA, "probe": 1.0}, **changes
    )  # three rounds: one for each tier
    run(job, tmp_path / "whole")
    for stop in (StopAfter(1), StopAfter(2, 2), StopAfter(3)):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[stop])
    run(job, tmp_path / "cut", resume=True)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert summary(tmp_path / "whole") == summary(tmp_path / "cut")
    server = Checkpoints(tmp_path / "whole" / "checkpoints").load_server()
    assert server["state"]["late"]  # otherwise this test would not see one
    assert len(server["state"]["grouping"]["clients"]) == 2


def test_clusters_json_holds_servers_and_clients_parts(finished: tuple[Path, Wire]) -> None:
    content = json.loads((finished[0] / "clusters.json").read_text())
    names = ["site-0", "site-2", "site-3", "site-4", "site-5"]
    assert content["clients"] == names
    assert len(content["labels"]) == len(content["eigenvalues"]) == len(content["distances"]) == 5
    assert [part["tier"] for part in content["tiers"]] == ["root", "cluster", "leaf"]
    assert (
        list(content["overlap"]["root-leaf"]) == list(content["overlap"]["cluster-leaf"]) == names
    )
    assert len(content["overlap"]["cluster-leaf"]["site-0"]) == len(content["layers"]) == 2


@pytest.mark.parametrize("tier", ["root", "cluster", "leaf"])
def test_each_tier_exported_gives_the_kernels_logits(
    tier: str, finished: tuple[Path, Wire], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the term in the training kernel, and in plain PEFT."""
    out, _ = finished
    folder = tmp_path / tier
    assert (
        main(["export", str(out), "--client", "site-3", "--tier", tier, "--out", str(folder)]) == 0
    )
    prepared = prepare(Result(out).job)
    _, server, stores = Checkpoints(out / "checkpoints").load()
    offer = prepared.method.offer(
        typed(HiLoRAState, server["state"]), 6, prepared.clients["site-3"]
    )
    assembly = prepared.engine.half.personal(
        prepared.clients["site-3"], {"method": offer}, stores["site-3"]
    )
    alone = Assembly((assembly.term(tier),), extras=assembly.extras)
    texts = ["the good film", "a very sad day was it"]
    examples = prepared.task.encode(
        [{"text": text, "label": "positive"} for text in texts], prepared.base.processor
    )
    expected = prepared.engine.half.kernel.logits(alone, examples)
    prepared.engine.half.kernel.close()
    assert torch.allclose(load(folder).logits(texts), expected, atol=1e-5)
    adapter, _, _ = read_adapter(folder)
    assert {f.rank for f in adapter.values()} == {4}
    if tier == "leaf":
        from peft import PeftModel
        from transformers import AutoModel

        base = AutoModel.from_pretrained(str(prepared.base.name), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        batch = prepared.task.collate(examples, prepared.base.pad_id)
        with torch.no_grad():
            hidden = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
            pooled = prepared.task.pool(hidden, batch)
        head = load(folder).assembly.extras
        assert isinstance(prepared.task, ClassifyText)
        logits = prepared.task.head_logits(
            pooled, {n.removeprefix("head."): e.value for n, e in head.items()}
        )
        assert torch.allclose(logits, expected, atol=1e-5)


def test_the_tiers_add_up_to_the_whole_adapter(finished: tuple[Path, Wire], tmp_path: Path) -> None:
    out, _ = finished
    client = Result(out).client("site-4")
    whole, _, _ = read_adapter(client.path)
    parts = [
        read_adapter(client.export(tmp_path / tier, tier=tier))[0]
        for tier in ("root", "cluster", "leaf")
    ]
    for site, factors in whole.items():
        assert torch.allclose(
            sum((part[site].product() for part in parts), torch.zeros(())),
            factors.product(),
            atol=1e-6,
        )
        assert torch.equal(torch.cat([part[site].A for part in parts]), factors.A)
    assert parts[2]["encoder.layer.0.attention.self.query"].B.any()
    merged = client.export(tmp_path / "merged", tier="root", merge=True)
    assert torch.allclose(
        load(merged).logits(["the good day"]),
        load(tmp_path / "root").logits(["the good day"]),
        atol=1e-5,
    )


def test_refused_tiers(
    finished: tuple[Path, Wire], tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="no tier 'twig'; it has root, cluster, leaf"):
        Result(finished[0]).client("site-0").export(tmp_path / "x", tier="twig")
    result = run(tiny_job(tiny_bert, silos, run={"rounds": 1}), tmp_path / "fedit")
    with pytest.raises(RunError, match="fedit, has none"):
        result.client("site-0").export(tmp_path / "y", tier="root")
    assert not (tmp_path / "x").exists()


def test_a_held_out_client_is_measured_at_once_and_after_its_leaf(
    finished: tuple[Path, Wire],
) -> None:
    out, _ = finished
    row = summary(out)["clients"]["site-1"]
    assert row["held_out"] is True
    zero, _, _ = read_adapter(out / "adapters" / "site-1")
    tuned, _, _ = read_adapter(out / "adapters_tuned" / "site-1")
    state = Checkpoints(out / "checkpoints").load_server()["state"]
    for site, factors in zero.items():
        root, cluster, leaf = factors.B.split(4, dim=1)
        assert torch.equal(root, state["root"][site].B * 2.0)
        assert any(torch.equal(cluster, adapter[site].B * 2.0) for adapter in state["clusters"])
        assert not leaf.any()
        assert torch.equal(tuned[site].B[:, :8], factors.B[:, :8])  # frozen
        assert tuned[site].B[:, 8:].any()
    tuned_model = load(out / "adapters_tuned" / "site-1")
    rows = build(Result(out).job).held_out[0].test
    assert tuned_model.evaluate(rows)["accuracy"] == pytest.approx(row["metric_tuned"])
    assert load(out / "adapters" / "site-1").evaluate(rows)["accuracy"] == pytest.approx(
        row["metric"]
    )


def test_adapt_does_what_the_run_does_with_a_held_out_client(
    finished: tuple[Path, Wire], sites: Path, tmp_path: Path
) -> None:
    out, _ = finished
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    found = adapt(out, sites / "site-1.jsonl", epochs=1, out=tmp_path / "new")
    row = summary(out)["clients"]["site-1"]
    assert found.placed.startswith("cluster ")
    assert found.measures["zero-shot"]["accuracy"] == row["metric"]
    assert found.measures["zero-shot"]["loss"] == row["loss"]
    assert found.measures["after 1 epoch"]["accuracy"] == row["metric_tuned"]
    ours, theirs = read_adapter(tmp_path / "new"), read_adapter(out / "adapters_tuned" / "site-1")
    for site, factors in ours[0].items():
        assert torch.equal(factors.B, theirs[0][site].B)
        assert torch.equal(factors.A, theirs[0][site].A)
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_the_penalty_keeps_tiers_apart(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    means = {}
    for gamma in (0.0, 10.0):
        job = tiny_job(
            tiny_bert,
            silos,
            run={"rounds": 6},
            method={**HILORA, "gamma_c": gamma, "gamma_l": gamma, "k_min": 1},
        )
        run(job, tmp_path / str(gamma))
        overlap = json.loads((tmp_path / str(gamma) / "clusters.json").read_text())["overlap"]
        values = [v for row in overlap["cluster-leaf"].values() for v in row]
        values += [v for row in overlap["root-cluster"] for v in row]
        means[gamma] = sum(values) / len(values)
    assert means[10.0] < 0.5 * means[0.0]


def test_too_few_rounds_are_refused_before_anything_is_written(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=r"run\.rounds = 2 is too few"):
        run(tiny_job(tiny_bert, silos, method=HILORA, run={"rounds": 2}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------ planted groups, trained for
# real
PAIRS = (("good", "bad"), ("happy", "sad"), ("bright", "dark"))


def topic(count: int, seed: int, group: int) -> list[dict[str, str]]:
    """Sentences with a word of each pair, of which the group's own pair decides the label."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [chance.choice(FILLER) for _ in range(chance.randint(3, 5))]
        sides = [chance.random() < 0.5 for _ in PAIRS]
        for pair, side in zip(PAIRS, sides, strict=True):
            words.insert(chance.randrange(len(words)), pair[0] if side else pair[1])
        rows.append({"text": " ".join(words), "label": "positive" if sides[group] else "negative"})
    return rows


@pytest.mark.slow
def test_planted_groups_are_found_by_training_and_newcomers_join_their_own(
    tiny_bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "silos"
    folder.mkdir()
    for number in range(12):
        lines = [json.dumps(row) for row in topic(48, number, number % 3)]
        (folder / f"c{number:02d}.jsonl").write_text("\n".join(lines) + "\n")
    job = tiny_job(
        tiny_bert,
        folder,
        method={**HILORA, "basis": "B - B_start"},
        federation={"held_out": ["c00", "c01", "c02"]},
        train={"local_steps": 16},
        run={"rounds": 10, "seed": 2, "eval_every": 10},
    )
    run(job, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "clusters.json").read_text())
    labels = dict(zip(content["clients"], content["labels"], strict=True))
    for one in labels:
        for other in labels:
            assert (labels[one] == labels[other]) == (int(one[1:]) % 3 == int(other[1:]) % 3)
    for name, member in (("c00", "c03"), ("c01", "c04"), ("c02", "c05")):
        found = adapt(tmp_path / "out", folder / f"{name}.jsonl", epochs=0)
        assert found.placed.startswith(f"cluster {labels[member]} of 3")
