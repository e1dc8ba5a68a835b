"""Masked rounds between real processes: three sites under a SuperLink, of which one is killed between
two exchanges.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from tests.deploy.deployed import Deployment

from fedgrove.deploy.audit import broken, read

QUITTING = Path(__file__).with_name("quitting.py")
JOB = {
    "method": {"name": "fedit", "weights": "uniform"},
    "privacy": {"clip": 5.0, "secure_aggregation": True},
}

pytestmark = pytest.mark.slow


def test_three_sites_under_masks_equal_the_local_engine(tiny_bert: Path, tmp_path: Path) -> None:
    with Deployment(tmp_path, tiny_bert, sites=3, run={"rounds": 1}, **JOB) as it:
        for name in (*it.names, "server"):
            it.start(name)
        it.finish()
        it.same_as_local()
        for name in it.names:
            log = it.site(name) / "audit.jsonl"
            assert broken(log) == []
            sent = [entry for entry in read(log) if entry.direction == "sent"]
            kinds = ["hello", "open", "keys", "shares", "train", "unmask", "evaluate", "finish"]
            assert [entry.kind for entry in sent] == kinds
            (update,) = [entry for entry in sent if entry.kind == "train"]
            assert [dtype for _, dtype, _ in update.tensors] == ["int32"]


@pytest.mark.parametrize("kind", ["keys", "shares", "train", "unmask"])
def test_a_site_that_is_killed_between_two_exchanges_is_left_out(
    kind: str, tiny_bert: Path, tmp_path: Path
) -> None:
    federation = {"min_clients": 2, "deadline": 60.0}
    with Deployment(
        tmp_path, tiny_bert, sites=3, run={"rounds": 5}, federation=federation, **JOB
    ) as it:
        for name in ("site-0", "site-1"):
            it.start(name)
        it.start("site-2", kind, script=QUITTING)
        it.start("server")
        it.finish()
        assert it.running["site-2"].wait(60) != 0, "it took part in no round from the second on"
        assert it.rounds() == 5
        trained: dict[str, list[int]] = {}
        for line in it.lines("train"):
            trained.setdefault(line["client"], []).append(line["round"])
        assert trained["site-0"] == trained["site-1"] == [1, 2, 3, 4, 5]
        log = [e for e in read(it.site("site-2") / "audit.jsonl") if e.direction == "sent"]
        died_after = {"keys": "evaluate", "shares": "keys", "train": "shares", "unmask": "train"}
        assert log[-1].kind == died_after[kind]
        if kind == "unmask":  # its update was there, and counts
            assert log[-1].round == trained["site-2"][-1]
        for name in ("site-0", "site-1"):
            kinds = [e.kind for e in read(it.site(name) / "audit.jsonl") if e.direction == "sent"]
            assert kinds.count("unmask") == 5
