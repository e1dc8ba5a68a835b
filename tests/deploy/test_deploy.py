"""For real, on this machine: SuperLink, gate and SuperNodes as processes, with TLS and keys, and
what goes wrong.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from tests.deploy.deployed import Deployment

from fedgrove.deploy.audit import broken, read
from fedgrove.deploy.layout import Request, init, make_key

pytestmark = pytest.mark.slow


def test_a_run_between_a_server_and_two_sites_equals_the_local_engine(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """One site keeps its B, so private state lives at the sites; nothing private and no text
    reaches the server.
    """
    with Deployment(tmp_path, tiny_bert, method={"name": "fedsa-lora"}, run={"rounds": 2}) as it:
        for name in it.names:
            it.start(name)
        it.start("server")
        it.finish()
        it.same_as_local()
        summary = json.loads((it.run / "summary.json").read_text())
        for name in it.names:
            entries = list(read(it.site(name) / "audit.jsonl"))
            assert broken(it.site(name) / "audit.jsonl") == []
            trained = [entry for entry in entries if entry.kind == "train"]
            assert [entry.direction for entry in trained] == ["received", "sent"] * 2
            measures = json.loads(
                next((it.site(name) / "runs").glob("*/measures.json")).read_text()
            )
            assert measures["metric"] == summary["clients"][name]["metric"]
        assert not list(it.server.rglob("adapters/site-*"))
        texts = [
            json.loads(line)["text"]
            for line in (it.site("site-0") / "site-0.jsonl").read_text().splitlines()
        ]
        for file in it.server.rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert not any(text.encode() in content for text in texts), file


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "fedit"}},
        {"method": {"name": "fedtreelora", "tau": 0.0}, "run": {"rounds": 3}},
        {"method": {"name": "hilora"}, "run": {"rounds": 6}},
        {
            "method": {"name": "fed-plora"},
            "federation": {"ranks": {"site-0": 1, "site-1": 4, "site-2": 2}},
        },
    ],
    ids=lambda changes: changes["method"]["name"],
)
def test_each_system_between_three_sites_equals_the_local_engine(
    changes: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    """FedIT and the three systems; Fed-PLoRA with a rank of its own at each site."""
    with Deployment(tmp_path, tiny_bert, sites=3, **{"run": {"rounds": 2}, **changes}) as it:
        for name in (*it.names, "server"):
            it.start(name)
        it.finish()
        it.same_as_local()
        clients = json.loads((it.run / "summary.json").read_text())["clients"]
        ranks = {name: row["rank"] for name, row in clients.items()}
        assert changes.get("federation", {}).get("ranks", ranks) == ranks


def test_who_is_not_known_is_refused_and_the_others_go_on(tiny_bert: Path, tmp_path: Path) -> None:
    """A key that the server does not have; then another authority's ca.crt; then a job that the
    site does not allow.
    """
    with Deployment(
        tmp_path, tiny_bert, sites=4, federation={"min_clients": 1}, run={"rounds": 3}
    ) as it:
        make_key(it.site("site-1"), "site-1", force=True)  # not admitted
        init(Request(tmp_path / "other", sites=["x"]))
        shutil.copy(tmp_path / "other" / "sites" / "x" / "ca.crt", it.site("site-2") / "ca.crt")
        it.change("site-3", "max_rounds = 3", "max_rounds = 2")
        for name in it.names:
            it.start(name)
        it.start("server")
        it.finish()
        assert {line["client"] for line in it.lines("train")} == {"site-0"}
        assert "does not know this site's key" in it.said("site-1")
        assert "cannot be verified with ca.crt" in it.said("site-2")
        refusal = "run.rounds = 3 is above the largest allowed here, 2"
        assert refusal in it.said("site-3")
        assert any(refusal in json.dumps(event) for event in it.events())
        assert refusal in it.said("server")
        for name in ("site-1", "site-2"):
            assert not (it.site(name) / "audit.jsonl").exists()


def test_a_site_killed_in_mid_round_comes_back_and_the_run_ends(
    tiny_bert: Path, tmp_path: Path
) -> None:
    federation = {"min_clients": 1, "deadline": 60.0}
    method, run = {"name": "fedsa-lora"}, {"rounds": 12}
    with Deployment(tmp_path, tiny_bert, federation=federation, method=method, run=run) as it:
        for name in it.names:
            it.start(name)
        it.start("server")
        it.until(lambda: it.rounds() >= 1, "the first round")
        seen = it.said("site-1").count("received train")
        it.until(lambda: it.said("site-1").count("received train") > seen, "a round in progress")
        it.kill("site-1")
        it.start("site-1")
        it.finish()
        rounds = {
            name: {line["round"] for line in it.lines("train") if line["client"] == name}
            for name in it.names
        }
        assert rounds["site-0"] == set(range(1, 13))
        missed = {event["round"] for event in it.events() if event["client"] == "site-1"}
        assert missed, "the kill came too late to be noticed"
        assert max(rounds["site-1"]) > min(missed), it.all()
        assert set(it.adapter("site-1"))


def test_a_tampered_update_is_refused_and_the_run_is_that_of_the_others(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """``hostile.py`` spoils each of its updates in another way; the honest site's adapter is as if
    it never sent any.

    It joins in mid-run, which is normal too.
    """
    with Deployment(
        tmp_path, tiny_bert, federation={"min_clients": 1, "deadline": 60.0}, run={"rounds": 24}
    ) as it:
        it.start("site-0")
        it.start("server")
        it.until(lambda: it.rounds() >= 1, "the first round")
        it.start("site-1", script=Path("tests/deploy/hostile.py"))
        it.finish()
        assert it.rounds() == 24
        spoiled = [event for event in it.events() if event["client"] == "site-1"]
        reasons = " ".join(json.dumps(event, ensure_ascii=False) for event in spoiled)
        for words in (
            "not finite",
            "rank",
            "no adapted layer",
            "1e+06",
            "not a Fedgrove tree",
            "numbers",
            "failed on it",
        ):
            assert words in reasons, (words, reasons)
        assert "Traceback" not in it.said("server")
        shutil.rmtree(tmp_path / "silos")
        alone = it.job.replace(data={"path": str(tmp_path / "alone")})
        (tmp_path / "alone").mkdir()
        shutil.copy(it.site("site-0") / "site-0.jsonl", tmp_path / "alone")
        it.job = alone
        local = it.local()
        there = {
            file.name: file.read_bytes()
            for file in (local / "adapters" / "site-0").glob("*.safetensors")
        }
        assert it.adapter("site-0") == there


def test_the_server_killed_and_resumed_ends_as_if_nothing_had_happened(
    tiny_bert: Path, tmp_path: Path
) -> None:
    with Deployment(tmp_path, tiny_bert, method={"name": "fedsa-lora"}, run={"rounds": 4}) as it:
        for name in it.names:
            it.start(name)
        it.start("server")
        it.until(lambda: it.rounds() >= 2, "two rounds")
        it.kill("server")
        time.sleep(3)  # its children see that it is gone
        it.start("server", "--resume")
        it.finish()
        it.same_as_local()


def test_ctrl_c_stops_the_server_cleanly(tiny_bert: Path, tmp_path: Path) -> None:
    import signal

    with Deployment(tmp_path, tiny_bert, run={"rounds": 50}) as it:
        for name in it.names:
            it.start(name)
        it.start("server")
        it.until(lambda: it.rounds() >= 1, "the first round")
        it.running["server"].send_signal(signal.SIGINT)
        it.finish(130)
        assert "--resume" in it.said("server")
        assert "Traceback" not in it.said("server")
        it.running["site-0"].send_signal(signal.SIGINT)
        assert it.running["site-0"].wait(30) == 130
        assert "Traceback" not in it.said("site-0")
