"""A server that asks for what it must not have: a site refuses, says so, and its disk stays its
own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.deploy.test_sites import SITE
from tests.engines.grid import virtual
from tests.tiny import save_silos, tiny_job

import fedgrove
from fedgrove.adapters.adapter import Factors
from fedgrove.deploy.audit import read
from fedgrove.deploy.site import open_place
from fedgrove.engines.flower.client import Runtime, Workshops
from fedgrove.engines.flower.deployable import deployable
from fedgrove.engines.flower.wire import Note, decode, encode
from fedgrove.job import Job
from fedgrove.runs.prepare import machine_choices

__all__ = ["virtual"]
pytestmark = pytest.mark.usefixtures("virtual")

RUN = "ab12"


class Server:
    """Sends whatever it likes to one site."""

    def __init__(self, folder: Path, job: Job):
        self.folder, self.job, self.workshops = folder, job, Workshops()

    def ask(self, kind: str, body: Any = None, **head: Any) -> Note:
        """A fresh place for each message, as the app makes it."""
        place = open_place(str(self.folder))
        note = Note(kind, {"run": RUN, "version": fedgrove.__version__, **head}, body or {})
        return decode(Runtime(place, self.workshops).handle(encode(note)))

    def who(self) -> dict[str, Any]:
        """The client that the site is."""
        hello = self.ask("hello", job=self.job.to_toml())
        return {"name": "site-0", "rank": 4, "examples": hello.head["row"]["train"]}

    def open(self, job: Job | None = None, **client: Any) -> Note:
        who = {**self.who(), **client}
        return self.ask("open", job=(job or self.job).to_toml(), client=who)

    def refused(self, answer: Note) -> str:
        assert answer.kind == "error", answer.head
        return str(answer.head["sentence"])


@pytest.fixture
def server(tiny_bert: Path, tmp_path: Path) -> Server:
    data = save_silos(tmp_path / "silos") / "site-0.jsonl"
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "site.toml").write_text(
        SITE.format(index=0, data=data, rank=4, model=tiny_bert), encoding="utf-8"
    )
    labels = {"labels": ["negative", "positive"]}
    job = tiny_job(
        tiny_bert, tmp_path / "silos", data=labels, train={"cohort": 1}, method={"name": "fedit"}
    )
    return Server(folder, deployable(machine_choices(job.resolved())))


def test_an_honest_server_is_answered(server: Server) -> None:
    assert server.ask("hello", job=server.job.to_toml()).head["row"]["name"] == "site-0"
    assert server.open().kind == "open"
    assert server.ask("here").kind == "here"


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"name": "../../escape"}, "no other client"),
        ({"name": "site-1"}, "no other client"),
        ({"rank": 5}, "above what site-0 affords"),
        ({"rank": 0}, "rank 0 is none"),
        ({"examples": 100_000}, "not on 100000"),
    ],
)
def test_a_client_that_it_is_not_is_refused(
    client: dict[str, Any], words: str, server: Server, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if server.folder not in path.parents}
    assert words in server.refused(server.open(**client))
    assert {path for path in tmp_path.rglob("*") if server.folder not in path.parents} == before


def test_a_rank_above_the_jobs_is_refused(server: Server) -> None:
    assert "rank 4 is none that lora.rank = 2" in server.refused(
        server.open(server.job.replace(lora={"rank": 2}))
    )


@pytest.mark.parametrize("kind", ["hello", "open"])
def test_another_version_is_refused_at_every_door(kind: str, server: Server) -> None:
    answer = server.ask(kind, job=server.job.to_toml(), client=server.who(), version="99.0")
    assert "the server runs Fedgrove 99.0" in server.refused(answer)


def test_another_revision_of_an_allowed_model_is_another_model(server: Server) -> None:
    changed = server.job.replace(model={"revision": "refs/pr/1"})
    assert "@refs/pr/1' is not allowed here" in server.refused(server.open(changed))
    file = server.folder / "site.toml"
    model = server.job.model.name
    who = server.who()
    file.write_text(file.read_text().replace(f'"{model}" = ', f'"{model}@refs/pr/1" = '))
    assert server.ask("open", job=changed.to_toml(), client=who).kind == "open"
    assert "is not allowed here" in server.refused(
        server.ask("open", job=server.job.to_toml(), client=who)
    )


@pytest.mark.parametrize("round", [0, -1, 4, 10**9])
def test_a_round_that_the_job_does_not_have_is_refused(round: int, server: Server) -> None:
    server.open()
    answer = server.ask("train", {"offer": {}}, round=round, store=0, keep=0)
    assert f"no round {round}" in server.refused(answer)
    assert not list(server.folder.rglob("store-*"))


def test_it_is_not_measured_on_what_it_trains_on(server: Server) -> None:
    server.open()
    assert "not measured on" in server.refused(
        server.ask("evaluate", {"offer": {}}, split="train", store=0)
    )


def test_a_site_without_this_run_says_so(server: Server) -> None:
    answer = server.ask("train", {"offer": {}}, round=1, store=0, keep=0)
    assert "does not know this run" in server.refused(answer)
    for key in ("../site", "", "a/b", "x" * 65):
        assert server.ask("train", {"offer": {}}, run=key, round=1, store=0, keep=0).kind == "error"
        assert server.ask("open", run=key, job=server.job.to_toml(), client={}).kind == "error"
    assert {path.name for path in server.folder.iterdir()} == {"site.toml", "audit.jsonl"}


def test_what_cannot_be_read_is_in_the_log_too(server: Server) -> None:
    blob = b"no message at all"
    answer = decode(Runtime(open_place(str(server.folder)), Workshops()).handle(blob))
    assert "not a Fedgrove tree" in server.refused(answer)
    came, left = read(server.folder / "audit.jsonl")
    assert (came.direction, came.kind, came.bytes) == ("received", "unreadable", len(blob))
    assert (left.direction, left.kind) == ("sent", "error")


def test_offers_that_do_not_fit_are_refused_before_anything_is_kept(server: Server) -> None:
    server.open()
    site = "encoder.layer.0.attention.self.query"
    for factors in (
        Factors(torch.ones(33, 32), torch.ones(32, 33), 1.0),
        Factors(torch.full((4, 32), float("nan")), torch.ones(32, 4), 1.0),
    ):
        answer = server.ask(
            "train", {"offer": {"method": {"adapter": {site: factors}}}}, round=1, store=0, keep=0
        )
        assert "was not used" in server.refused(answer)
    assert not list(server.folder.rglob("store-*"))


def test_what_is_wrong_with_the_data_is_told_to_the_site_alone(
    server: Server, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that asks for other classes would else learn a site's labels one by one."""
    job = server.job.replace(data={"labels": ["negative", "other"]})
    with caplog.at_level("ERROR", logger="fedgrove.engines.flower"):
        answer = server.ask("hello", job=job.to_toml())
    assert (
        server.refused(answer) == "site-0 cannot use its data for this job; it has been told why."
    )
    assert "'positive' is not in data.labels" in caplog.text
    assert str(tmp_path) not in json.dumps(dict(answer.head))


def test_data_that_changed_in_mid_run_are_noticed_after_a_restart(server: Server) -> None:
    assert server.open().kind == "open"
    server.workshops = Workshops()  # the site's process ended
    assert server.open().kind == "open"
    who = server.who()
    path = server.folder.parent / "silos" / "site-0.jsonl"
    path.write_text(path.read_text().replace("film", "book"))
    server.workshops = Workshops()
    answer = server.ask("open", job=server.job.to_toml(), client=who)
    assert "data of site-0 changed" in server.refused(answer)
    assert "data of site-0 changed" in server.refused(
        server.ask("train", {"offer": {}}, round=1, store=0, keep=0)
    )


@pytest.mark.parametrize("randomness", ["seed", "secret"])
def test_a_round_that_is_asked_for_again_is_paid_for_again(randomness: str, server: Server) -> None:
    """Rounds that the server does not take, and one round with several offers, are in the site's
    ε.
    """
    from fedgrove.privacy.accountant import default_delta, epsilon

    privacy = {"example_clip": 0.5, "example_noise": 1.0, "randomness": randomness}
    server.job = server.job.replace(privacy=privacy)
    who = server.who()
    assert server.open().kind == "open"
    names = [
        f"encoder.layer.{layer}.attention.self.{part}"
        for layer in (0, 1)
        for part in ("query", "value")
    ]

    def train(size: float, round: int = 1, store: int = 0) -> Note:
        adapter = {
            name: Factors(torch.full((4, 32), 0.1), torch.full((32, 4), size), 1.0)
            for name in names
        }
        answer = server.ask(
            "train", {"offer": {"method": {"whole": adapter}}}, round=round, store=store, keep=0
        )
        assert answer.kind == "train", answer.head
        return answer

    def paid() -> float:
        adapter = {
            name: Factors(torch.full((4, 32), 0.1), torch.zeros(32, 4), 1.0) for name in names
        }
        body = {"offer": {"method": {"whole": adapter}}}
        answer = server.ask("finish", body, store=1, held_out=False, measure=True)
        assert answer.kind == "finish", answer.head
        return float(answer.head["row"]["epsilon"])

    def after(trainings: int) -> float:
        rate = server.job.train.batch_size / who["examples"]
        steps = trainings * int(server.job.train.local_steps or 0)
        return float(epsilon(1.0, [(rate, steps)], default_delta(who["examples"])) or 0.0)

    train(0.0)
    assert paid() == pytest.approx(after(1))
    train(0.0)  # the answer was lost on its way: the same one again, unless the noise is drawn anew
    assert paid() == pytest.approx(after(1 if randomness == "seed" else 2))
    train(0.2)
    train(0.3, round=2, store=1)  # whose update the server does not take: store 1 is still the last
    assert paid() == pytest.approx(after(3 if randomness == "seed" else 4))
    (noted,) = server.folder.rglob("spent.json")
    noted.write_text("{")
    answer = server.ask("finish", {"offer": {}}, store=1, held_out=False)
    assert "spent.json cannot be read" in server.refused(answer)
