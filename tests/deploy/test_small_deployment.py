"""The smallest real run: server, SuperLink, gate, two SuperNodes and two sites as processes, TLS
and keys, one round.

It is what ``make test`` has of ``test_deploy.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from tests.deploy.deployed import Deployment

from fedgrove.deploy.audit import broken, read


def test_one_round_between_two_sites_equals_the_local_engine(
    tiny_bert: Path, tmp_path: Path
) -> None:
    with Deployment(tmp_path, tiny_bert, method={"name": "fedsa-lora"}, run={"rounds": 1}) as it:
        for name in (*it.names, "server"):
            it.start(name)
        it.finish()
        it.same_as_local()
        for name in it.names:
            log = it.site(name) / "audit.jsonl"
            assert broken(log) == []
            kinds = [entry.kind for entry in read(log) if entry.direction == "sent"]
            assert kinds == ["hello", "open", "train", "evaluate", "finish"]
        assert not list(it.server.rglob("adapters/site-*"))
