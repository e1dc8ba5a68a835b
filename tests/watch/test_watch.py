"""The live page, from the files of small run directories."""

from __future__ import annotations

import http.client
import json
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.report.conftest import build
from tests.stops import hears_ctrl_c
from tests.tiny import tiny_job
from typer.testing import CliRunner

from fedgrove.adapters.adapter import Factors
from fedgrove.ground.errors import RunError
from fedgrove.job import Job
from fedgrove.runs.directory import RunDirectory
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.watch.beside import page
from fedgrove.watch.forming import forming, sites_of
from fedgrove.watch.look import Look, stamp
from fedgrove.watch.server import Board, Server, policy, served
from fedgrove.watch.standing import Standing

PRIVATE = "\n[privacy]\nclip = 0.5\nclient_noise = 1.2\n"


def going(folder: Path, *, rounds: int = 3, of: int = 5, more: str = "", **made: Any) -> Path:
    """The directory of a run that is after ``rounds`` of its rounds."""
    build(folder, rounds=rounds, **{"clients": 4, **made})
    (folder / "summary.json").unlink()
    (folder / "run.lock").touch()
    job = (folder / "job.toml").read_text().replace(f"rounds = {rounds}", f"rounds = {of}")
    (folder / "job.toml").write_text(job + more)
    return folder


def event(folder: Path, round: int, client: str, what: str, reason: str) -> None:
    line = {"time": "2026-01-02T03:04:05+00:00", "round": round, "client": client}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(line | {"event": what, "reason": reason}) + "\n")


@contextmanager
def open_server(folder: Path) -> Iterator[Server]:
    server = Server(folder, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(server: Server, path: str) -> tuple[int, dict[str, str], str]:
    port = server.server_address[1]
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


# ------------------------------------------------------------------------- words
def test_where_a_run_is(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    assert Standing.of(run).word == "Running: round 3 of 5 is done."
    (run / "run.lock").unlink()
    assert Standing.of(run).word == "Stopped after round 3 of 5; it goes on with --resume."
    with RunDirectory(run).lock():
        (run / "metrics.jsonl").write_text("")
        assert Standing.of(run).word == "Running: the first of 5 rounds is going on."
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (run / "run.lock").write_text(f"{ended.pid} {platform.node()}\n")  # as after kill -9
    assert Standing.of(run).word == "Stopped after round 0 of 5; it goes on with --resume."
    (run / "run.lock").write_text(f"{ended.pid} another-machine\n")
    assert Standing.of(run).word == "Running: the first of 5 rounds is going on."
    finished = build(tmp_path / "finished", rounds=2, clients=3)
    assert Standing.of(finished).word == "Finished after round 2 of 2."


def test_a_half_written_line_is_not_read(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    event(run, 3, "amazon-1", "left out", "too slow")
    before = Look(run).parts(0.0)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"round": 4, "client": "amaz')
    assert Look(run).parts(0.0) == before


def test_numbers_so_far_are_those_that_the_end_will_tell(tmp_path: Path) -> None:
    ended = build(tmp_path / "ended", rounds=3, clients=4)
    run = going(tmp_path / "run")
    mine, theirs = Standing.of(run).run, Standing.of(ended).run
    assert mine.values("metric") == theirs.values("metric")
    assert mine.history == theirs.history
    assert mine.summary["bytes"] == theirs.summary["bytes"]
    assert mine.metric == "accuracy"


def test_who_is_here_late_or_refused_and_why(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    event(run, 1, "amazon-0", "left out", "long ago")
    event(run, 2, "stranger", "refused", "its rank is too large")
    event(run, 3, "amazon-1", "late", "its update of round 2 is used in this one")
    event(run, 4, "amazon-2", "left out", "no answer")
    standing = Standing.of(run)
    assert standing.present() == "4 of 4 clients trained in round 3; 1 late, 1 left out, 1 refused."
    now = {row[0]: row[1] for row in standing.clients()[1:]}
    assert now["amazon-0"] == "trained in round 3"
    assert now["stranger"] == "refused in round 2: its rank is too large"
    assert now["amazon-1"].startswith("late in round 3: its update")
    assert now["amazon-2"] == "left out in round 4: no answer"
    assert [row[0] for row in standing.latest()[1:]] == [
        "amazon-2",
        "amazon-1",
        "stranger",
        "amazon-0",
    ]


def test_many_clients_have_no_row_of_their_own(tmp_path: Path) -> None:
    run = going(tmp_path / "run", rounds=1, clients=70)
    event(run, 1, "client-069", "left out", "no answer")
    standing = Standing.of(run)
    rows = standing.clients()
    assert len(rows) == 1 + 60
    assert rows[1][0] == "client-069"
    assert standing.more_clients() == "10 more clients in metrics.jsonl."


def test_epsilon_is_what_the_rounds_so_far_have_spent(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    from fedgrove.privacy import accountant

    run = going(tmp_path / "run", more=PRIVATE)
    (tile,) = [tile for tile in Standing.of(run).tiles() if "ε" in tile.label]
    expected = accountant.epsilon(1.2, [(1.0, 3)], 4**-1.1)
    assert expected is not None
    assert tile.value == f"{expected:.3g}"


def test_the_time_left_is_by_the_pace_that_was_seen(tmp_path: Path) -> None:
    run = going(tmp_path / "run", of=9)
    look = Look(run)
    look.parts(100.0)
    text = (run / "metrics.jsonl").read_text()
    later = [json.loads(line) | {"round": 5} for line in text.splitlines()[-8:]]
    (run / "metrics.jsonl").write_text(text + "".join(json.dumps(each) + "\n" for each in later))
    assert "round 5 of 9 is done, about 20 s left" in look.parts(110.0)["head"]


# ------------------------------------------------------------------------- parts
def test_the_reports_figures_are_drawn_and_nothing_is_written(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    before = sorted(run.rglob("*"))
    parts = Look(run).parts(0.0)
    assert parts["curves"].count("<svg") == 4
    assert parts["clients"].count("<svg") == 2
    assert sorted(run.rglob("*")) == before


def test_a_client_cannot_write_into_the_page(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    event(run, 3, "<script>x</script>", "refused", "<img src=x onerror=y>")
    joined = "".join(Look(run).parts(0.0).values())
    assert "<script>" not in joined
    assert "<img src=x" not in joined


def test_what_is_broken_is_said(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    (run / "metrics.jsonl").write_text("nonsense\n")
    assert "metrics.jsonl line 1 is no JSON object" in Look(run).parts(0.0)["head"]
    assert "is being prepared" in Look(tmp_path / "absent").parts(0.0)["head"]


def test_a_stamp_changes_with_the_run(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    before = stamp(run)
    assert stamp(run) == before
    event(run, 1, "a", "late", "b")
    assert stamp(run) != before


# ----------------------------------------------------------------------- forming
def save(run: Path, state: dict[str, Any], **more: Any) -> None:
    Checkpoints(run / "checkpoints").save(2, {"state": state, **more}, {})


def test_who_a_defence_cut_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    run = going(tmp_path / "run", more='\n[defence]\nrule = "krum"\nattackers = 0.25\n')
    lines = [
        {"round": number, "client": f"amazon-{place}", "scale": 1.0, "weight": float(place > 0)}
        for number in (1, 2)
        for place in range(4)
    ]
    save(run, {}, defence={"history": {}, "lines": lines})
    found = forming(run, Job.load(run / "job.toml"))
    assert found == {"defence.json": {"defence": {"rule": "krum", "norm": None}, "lines": lines}}
    method = Look(run).parts(0.0)["method"]
    assert "Whose changes the defence cut" in method
    assert method.count("<svg") == 2


def test_sites_are_named_by_the_factors() -> None:
    factors = Factors(torch.zeros(2, 5), torch.zeros(3, 2), 1.0)
    (site,) = sites_of({"root": {"encoder.layer.3.query": factors}}).values()
    assert (site.name, site.layer, site.in_features, site.out_features) == (
        "encoder.layer.3.query",
        3,
        5,
        3,
    )


def test_a_checkpoint_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest.json").write_text(
        '{"round": 1, "server": "gone", "clients": {}}'
    )
    parts = Look(run).parts(0.0)
    assert "What the method and the defence have so far could not be shown" in parts["notes"]
    assert "<svg" in parts["curves"]


@pytest.mark.parametrize(
    ("method", "file"),
    [("fedtreelora", "tree.json"), ("hilora", "clusters.json"), ("grove", "grove.json")],
)
def test_tree_and_clusters_are_read_from_the_checkpoint(
    method: str, file: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    from fedgrove.start import run

    job = tiny_job(tiny_bert, silos).override([f"method.name={method}", "run.rounds=3"])
    out = run(job, tmp_path / "out").path
    left = json.loads((out / file).read_text())
    left.pop("lambda", None)  # the clients' own, which are no part of the server's state
    left.get("overlap", {}).pop("root-leaf", None)
    left.get("overlap", {}).pop("cluster-leaf", None)
    (out / "summary.json").unlink()
    found = json.loads(json.dumps(forming(out, Job.load(out / "job.toml"))[file]))
    found.pop("lambda", None)
    assert found == left
    parts = Look(out).parts(0.0)
    assert "could not be shown" not in parts["notes"]
    assert "<svg" in parts["method"]


# ------------------------------------------------------------------------ server
def test_the_page_its_rules_and_the_wrong_token(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    with open_server(run) as server:
        status, headers, text = get(server, f"/{server.token}/")
        assert status == 200
        assert "EventSource" in text
        assert headers["Content-Security-Policy"] == policy(text)
        assert "script-src 'sha256-" in policy(text)
        assert not re.search(r"https?://", text)
        assert headers["Referrer-Policy"] == "no-referrer"
        for path in ("/", "/wrong/", "/wrong/events", f"/{server.token}x/", "nonsense", "/ä/"):
            path = path.encode().decode("latin-1")
            assert _status(server, path) == 403
        for path in ("nothing", "../job.toml", "report.html"):
            assert get(server, f"/{server.token}/{path}")[0] == 404
        (run / "report.html").write_text("<p>the report</p>")
        assert get(server, f"/{server.token}/report.html")[2] == "<p>the report</p>"


def _status(server: Server, path: str) -> int:
    host, port = str(server.server_address[0]), int(server.server_address[1])
    with closing(socket.create_connection((host, port), timeout=30)) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode("latin-1"))
        return int(connection.makefile("rb").readline().split()[1])


def told(answer: http.client.HTTPResponse) -> dict[str, str]:
    """The next parts of a stream."""
    while line := answer.readline():
        if line.startswith(b"data: "):
            found: dict[str, str] = json.loads(line[6:])
            return found
    raise AssertionError("the stream ended")


def test_parts_come_when_the_run_grew_and_only_those_that_changed(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    with open_server(run) as server:
        port = server.server_address[1]
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request("GET", f"/{server.token}/events")
            answer = connection.getresponse()
            assert answer.getheader("Content-Type") == "text/event-stream"
            assert set(told(answer)) == {"head", "curves", "clients", "method", "notes"}
            event(run, 4, "amazon-2", "left out", "no answer")
            changed = told(answer)
            assert set(changed) == {"clients", "method"}
            assert "no answer" in changed["clients"]


def test_nothing_is_drawn_while_nobody_looks(tmp_path: Path) -> None:
    board = Board(Look(going(tmp_path / "run")))
    assert board.after(0, 0.3) == (0, {})
    with board.watching():
        assert board.after(0, 120)[0] == 1
    board.close()


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"There is no .*absent; give the directory of a run"):
        served(tmp_path / "absent")
    with pytest.raises(RunError, match="is no run"):
        served(tmp_path)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port} .*choose another --port"):
            Server(tmp_path, port=port)
        with (
            pytest.raises(RunError, match=f"port {port} .*choose another --port"),
            page(tmp_path, port),
        ):
            pass
    with pytest.raises(RunError, match=r"cannot be served at no\.such\.host\.invalid"):
        Server(tmp_path, "no.such.host.invalid", 0)


def test_the_command_refuses_a_foreign_directory(tmp_path: Path) -> None:
    from fedgrove.cli import app

    found = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert isinstance(found.exception, RunError)


def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    run = going(tmp_path / "run")
    command = [sys.executable, "-m", "fedgrove", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )
    assert process.stdout is not None
    assert re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "The page is closed" in out


def test_a_page_beside_a_run_ends_with_it(tmp_path: Path) -> None:
    with page(tmp_path / "to-come", 0) as address:
        host, port, token = re.fullmatch(r"http://(.*):(\d+)/([\w-]+)/", address).groups()  # type: ignore[union-attr]
        with closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
            connection.request("GET", f"/{token}/")
            assert connection.getresponse().status == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    assert not (tmp_path / "to-come").exists()
