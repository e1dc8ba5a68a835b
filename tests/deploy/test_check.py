"""``fedgrove deploy check``: every kind of trouble is named in plain words, with its remedy; good
order is quiet.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_job

pytest.importorskip("flwr")

from fedgrove.cli import main
from fedgrove.deploy import check as checks
from fedgrove.deploy import gate
from fedgrove.deploy.certificates import (
    Issued,
    load_issued,
    new_authority,
    new_node_key,
    new_server,
    write_private,
)
from fedgrove.deploy.check import Finding, check
from fedgrove.deploy.gate import Gate, OpenGate
from fedgrove.deploy.host import sites_by_key
from fedgrove.deploy.launch import free_port
from fedgrove.deploy.layout import Request, admit_key, init, make_key

LABELS = ["negative", "positive"]


@pytest.fixture
def deployed(tiny_bert: Path, silos: Path, tmp_path: Path) -> Path:
    job = tiny_job(tiny_bert, silos, data={"labels": LABELS})
    (tmp_path / "job.toml").write_text(job.to_toml())
    init(Request(tmp_path / "d", "localhost", free_port(), ["site-0"], tmp_path / "job.toml"))
    site = tmp_path / "d" / "sites" / "site-0"
    (site / "data.jsonl").write_bytes((silos / "site-0.jsonl").read_bytes())
    edit(site / "site.toml", "data.csv", "data.jsonl")
    return tmp_path / "d"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def problems(folder: Path, job: Path | None = None) -> list[str]:
    return [str(finding) for finding in check(folder, job=job) if not finding.ok]


def only(found: list[str], *words: str) -> None:
    """Exactly one problem, in these words."""
    assert len(found) == 1, found
    for word in words:
        assert word in found[0], found[0]


@pytest.fixture
def running(deployed: Path) -> Iterator[Path]:
    """The gate alone stands for a running server: what `check` asks stops there."""
    with opened(deployed):
        yield deployed


class opened:
    def __init__(self, deployed: Path):
        self.server = deployed / "server"

    def __enter__(self) -> None:
        from fedgrove.deploy.layout import ServerFile

        port = ServerFile.load(self.server).server.port
        sites = sites_by_key(self.server)
        app = Gate("https://127.0.0.1:1", ssl.create_default_context(), 10, sites)
        self.gate = OpenGate(
            app, "127.0.0.1", port, self.server / "server.crt", self.server / "server.key"
        )

    def __exit__(self, *ignored: Any) -> None:
        self.gate.close()


def replace_server(deployed: Path, certificate: Issued) -> None:
    server = deployed / "server"
    (server / "server.crt").write_bytes(certificate.certificate_pem())
    write_private(server / "server.key", certificate.key_pem(), force=True)


def authority(deployed: Path) -> Issued:
    return load_issued(deployed / "server" / "ca.crt", deployed / "server" / "ca.key")


# ------------------------------------------------------------ all is well
def test_a_fresh_server_is_in_order(deployed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(deployed / "server") == []
    assert main(["deploy", "check", str(deployed / "server")]) == 0
    assert "All is well." in capsys.readouterr().out


def test_a_site_with_a_running_server_is_in_order(running: Path, tmp_path: Path) -> None:
    found = check(running / "sites" / "site-0", job=tmp_path / "job.toml")
    assert [str(finding) for finding in found if not finding.ok] == []
    said = "\n".join(map(str, found))
    for words in (
        "clocks agree",
        "certificate is for localhost",
        "18 examples to train on",
        "negative",
        "is allowed",
    ):
        assert words in said


# ------------------------------------------------------------ the server's side
def test_labels_that_the_job_does_not_name(deployed: Path) -> None:
    edit(deployed / "server" / "job.toml", 'labels = ["negative", "positive"]\n', "")
    only(problems(deployed / "server"), "data.labels is missing", "must name the classes")


def test_a_model_that_is_not_there(deployed: Path, tiny_bert: Path) -> None:
    edit(deployed / "server" / "job.toml", str(tiny_bert), "/nowhere/bert")
    only(problems(deployed / "server"), "/nowhere/bert is not on this machine")


def test_an_embedded_model_is_no_problem_whether_it_is_here_or_not(
    deployed: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGROVE_CACHE", str(tmp_path / "cache"))
    edit(deployed / "server" / "job.toml", str(tiny_bert), "minilm")
    assert any(
        "minilm is fetched at first use (84 MB)" in str(finding)
        for finding in check(deployed / "server")
    )
    (tmp_path / "cache" / "minilm-0.1.0-x").mkdir(parents=True)
    (tmp_path / "cache" / "minilm-0.1.0-x" / "config.json").touch()
    assert any("minilm is here" in str(finding) for finding in check(deployed / "server"))
    assert problems(deployed / "server") == []


def test_a_key_that_others_can_read(deployed: Path) -> None:
    (deployed / "server" / "server.key").chmod(0o644)
    only(problems(deployed / "server"), "others can read server.key", "chmod 600")


def test_an_expired_certificate(deployed: Path) -> None:
    old = datetime.now(UTC) - timedelta(days=40)
    replace_server(deployed, new_server(authority(deployed), ["localhost"], now=old, days=20))
    only(problems(deployed / "server"), "server.crt expired on", "fedgrove deploy renew")


def test_a_certificate_that_expires_soon(deployed: Path) -> None:
    replace_server(deployed, new_server(authority(deployed), ["localhost"], days=10))
    only(problems(deployed / "server"), "server.crt expires on")


def test_a_certificate_of_another_authority(deployed: Path) -> None:
    replace_server(deployed, new_server(new_authority("other"), ["localhost"]))
    only(problems(deployed / "server"), "server.crt is not signed by ca.crt")
    same_name = new_authority("Fedgrove authority of localhost")  # another key under the same name
    replace_server(deployed, new_server(same_name, ["localhost"]))
    only(problems(deployed / "server"), "server.crt is not signed by ca.crt", "does not verify")


def test_a_certificate_for_another_name(deployed: Path) -> None:
    edit(deployed / "server" / "server.toml", 'host = "localhost"', 'host = "fl.example.org"')
    only(
        problems(deployed / "server"),
        "server.crt is not for fl.example.org",
        "localhost, 127.0.0.1",
    )


def test_a_key_of_another_certificate(deployed: Path) -> None:
    other = new_server(authority(deployed), ["localhost"])
    write_private(deployed / "server" / "server.key", other.key_pem(), force=True)
    only(problems(deployed / "server"), "server.key does not go with server.crt")


def test_no_sites_and_a_private_key_among_the_public_ones(deployed: Path) -> None:
    key = deployed / "server" / "keys" / "site-0.pub"
    key.write_bytes((deployed / "sites" / "site-0" / "node.key").read_bytes())
    only(problems(deployed / "server"), "must not leave its site")
    key.unlink()
    only(problems(deployed / "server"), "holds no site's key")


def test_the_same_key_for_two_sites(deployed: Path) -> None:
    keys = deployed / "server" / "keys"
    (keys / "site-1.pub").write_bytes((keys / "site-0.pub").read_bytes())
    only(problems(deployed / "server"), "hold the same key")


def test_a_port_that_is_taken(deployed: Path) -> None:
    import socket

    from fedgrove.deploy.layout import ServerFile

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", ServerFile.load(deployed / "server").server.port))
        taken.listen()
        taken.settimeout(0.1)
        checks_timeout, checks._TIMEOUT = checks._TIMEOUT, 1.0
        try:
            only(problems(deployed / "server"), "cannot be listened on", "server.port")
        finally:
            checks._TIMEOUT = checks_timeout


def test_a_server_that_runs_already_is_no_problem(running: Path) -> None:
    edit(running / "server" / "server.toml", 'listen = "0.0.0.0"', 'listen = "127.0.0.1"')
    assert problems(running / "server") == []


# ------------------------------------------------------------ a site's side
def test_nobody_listens(deployed: Path) -> None:
    only(problems(deployed / "sites" / "site-0"), "cannot be reached", "is the server running")


def test_a_name_that_nobody_knows(deployed: Path) -> None:
    site = deployed / "sites" / "site-0"
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(
        text.replace('server = "localhost:', 'server = "no.such.name.invalid:')
    )
    only(problems(site), "no.such.name.invalid cannot be resolved")


def test_the_wrong_authority(running: Path, tmp_path: Path) -> None:
    site = running / "sites" / "site-0"
    (site / "ca.crt").write_bytes(new_authority("other").certificate_pem())
    only(problems(site), "not signed by ca.crt", "another server than you think")


def test_the_servers_certificate_expired_or_is_for_another_name(deployed: Path) -> None:
    old = datetime.now(UTC) - timedelta(days=40)
    replace_server(deployed, new_server(authority(deployed), ["localhost"], now=old, days=20))
    with opened(deployed):
        only(problems(deployed / "sites" / "site-0"), "has expired", "fedgrove deploy renew")
    replace_server(deployed, new_server(authority(deployed), ["localhost"]))
    site = deployed / "sites" / "site-0"
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace('server = "localhost:', 'server = "127.0.0.2:'))
    server = deployed / "server"
    from fedgrove.deploy.layout import ServerFile

    app = Gate("https://127.0.0.1:1", ssl.create_default_context(), 10)
    port = ServerFile.load(server).server.port
    other = OpenGate(app, "127.0.0.2", port, server / "server.crt", server / "server.key")
    try:
        only(problems(site), "is not for 127.0.0.2")
    finally:
        other.close()


@pytest.mark.parametrize(("skew", "words"), [(-60.0, "60 s ahead"), (400.0, "400 s behind")])
def test_clocks_that_differ(
    skew: float, words: str, running: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = gate.about()
    monkeypatch.setattr(gate, "about", lambda: {**told, "time": time.time() + skew})
    only(problems(running / "sites" / "site-0"), words, "NTP")


def test_clocks_that_differ_a_little(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = gate.about()
    monkeypatch.setattr(
        gate, "about", lambda: {**told, "time": time.time() + 100}
    )  # behind is allowed
    assert problems(running / "sites" / "site-0") == []


def test_versions_that_differ(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = gate.about()
    answers = iter([{**told, "fedgrove": "9.9"}, told])  # the server's answer, then our own
    monkeypatch.setattr(gate, "about", lambda: next(answers))
    only(
        problems(running / "sites" / "site-0"), "fedgrove is", "9.9 at the server", "fedgrove==9.9"
    )


def test_another_server_at_that_address(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "about", lambda: {"something": "else"})
    only(problems(running / "sites" / "site-0"), "is no Fedgrove server")


def test_data_that_is_missing_or_does_not_fit(running: Path, tmp_path: Path) -> None:
    site, job = running / "sites" / "site-0", tmp_path / "job.toml"
    rows = (site / "data.jsonl").read_text()
    (site / "data.jsonl").write_text(rows + '{"text": "x"}\n')
    only(problems(site, job), "data.jsonl, line 25", "no column 'label'")
    (site / "data.jsonl").write_text(rows + json.dumps({"text": "x", "label": "neutral"}) + "\n")
    only(problems(site, job), "'neutral'", "data.labels")
    (site / "data.jsonl").unlink()
    only(problems(site, job), "data.jsonl does not exist", "data.path")


def test_a_job_that_is_not_allowed(running: Path, tmp_path: Path) -> None:
    edit(running / "sites" / "site-0" / "site.toml", "max_rounds = 3", "max_rounds = 2")
    only(problems(running / "sites" / "site-0", tmp_path / "job.toml"), "run.rounds = 3")


def test_keys_of_a_site(running: Path) -> None:
    site = running / "sites" / "site-0"
    (site / "node.key").chmod(0o640)
    only(problems(site), "others can read node.key")
    (site / "node.key").chmod(0o600)
    (site / "node.pub").write_bytes(new_node_key("another")[1])
    only(problems(site), "node.pub is not the public half")
    (site / "node.key").unlink()
    only(problems(site), "node.key is missing", "fedgrove deploy key")


def test_a_key_that_the_server_does_not_admit(running: Path) -> None:
    site = running / "sites" / "site-0"
    make_key(site, "site-0", force=True)
    only(problems(site), "does not admit this site's key", "fedgrove deploy admit", "starts")
    admit_key(running / "server", "site-0-new", site / "node.pub")
    only(problems(site), "does not admit")  # until it is started again


def test_a_key_that_the_server_admits_under_another_name(running: Path) -> None:
    site = running / "sites" / "site-0"
    edit(site / "site.toml", 'name = "site-0"', 'name = "site-1"')
    only(problems(site), "as that of 'site-0', not of 'site-1'", "site.name")


def test_a_server_that_does_not_say_whom_it_admits(
    running: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gate, "_site_of", lambda self, scope: {})  # as one of before did
    only(problems(running / "sites" / "site-0"), "does not say whether", "the same Fedgrove")


def test_a_job_that_waits_for_more_sites_than_can_come(deployed: Path) -> None:
    edit(deployed / "server" / "job.toml", "min_clients = 1", "min_clients = 2")
    only(problems(deployed / "server"), "waits for 2 sites, and 1 can come", "min_clients")


def test_a_job_that_only_one_process_can_run(deployed: Path) -> None:
    edit(deployed / "server" / "job.toml", "noise = false", "noise = true")
    only(problems(deployed / "server"), "run.noise = true", "stays at the sites")


def test_exit_codes(deployed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "check", str(deployed / "sites" / "site-0")]) == 1
    assert "1 problem." in capsys.readouterr().out
    assert main(["deploy", "check", str(tmp_path)]) == 2
    assert main(["deploy", "check", str(deployed / "server"), "--side", "both"]) == 2
    assert main(["deploy", "check", str(deployed / "server"), "--side", "site"]) == 1
    assert "site.toml" in capsys.readouterr().out


def test_a_finding_reads_as_a_line() -> None:
    assert str(Finding("the door")) == "ok       the door"
    assert str(Finding("the door", "close it")) == "problem  the door: close it"
