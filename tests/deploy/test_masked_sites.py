"""Sites that mask: they sign with their node keys, know each other by their own folders, and refuse a
server that lies.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from tests.engines.grid import FakeGrid, virtual
from tests.tiny import save_silos, tiny_job

import fedgrove
from fedgrove.deploy.check import check
from fedgrove.deploy.layout import Request, admit_key, init, make_key
from fedgrove.deploy.site import open_place
from fedgrove.engines.flower.client import Runtime, Workshops
from fedgrove.engines.flower.deployable import deployable
from fedgrove.engines.flower.masked import MaskedRound
from fedgrove.engines.flower.post import Failure
from fedgrove.engines.flower.wire import Note, decode, encode
from fedgrove.job import Job
from fedgrove.methods.contract import ClientInfo, Update
from fedgrove.runs.parts import Parts
from fedgrove.runs.prepare import machine_choices
from fedgrove.secure.keys import SecureError

__all__ = ["virtual"]
pytestmark = pytest.mark.usefixtures("virtual")

NAMES = ["site-0", "site-1", "site-2"]
RUN = "ab12"


class Server:
    """Sends whatever it likes to three sites of a deployment, whose folders ``init`` wrote."""

    def __init__(self, folder: Path, bert: Path, **changes: Any):
        silos = save_silos(folder / "silos")
        privacy = {"clip": 5.0, "secure_aggregation": True, **changes.pop("privacy", {})}
        job = tiny_job(
            bert,
            silos,
            data={"labels": ["negative", "positive"]},
            train={"cohort": 1},
            method={"name": "fedit", "weights": "uniform"},
            privacy=privacy,
            **changes,
        )
        (folder / "job.toml").write_text(job.to_toml())
        init(Request(folder / "d", sites=NAMES, job=folder / "job.toml"))
        self.sites = {name: folder / "d" / "sites" / name for name in NAMES}
        for name, site in self.sites.items():
            text = (site / "site.toml").read_text()
            data = str(silos / f"{name}.jsonl")
            (site / "site.toml").write_text(text.replace('path = "data.csv"', f'path = "{data}"'))
        self.folder, self.job = folder, deployable(machine_choices(job.resolved()))
        self.workshops = {name: Workshops() for name in NAMES}
        self.infos: list[ClientInfo] = []

    def open(self) -> None:
        for name in NAMES:
            hello = self.ask(name, "hello", job=self.job.to_toml())
            info = ClientInfo(name, 2, hello.head["row"]["train"])
            assert self.ask(name, "open", job=self.job.to_toml(), client=vars(info)).kind == "open"
            self.infos.append(info)
        self.parts = Parts.of(self.job, self.infos)

    def ask(self, name: str, kind: str, body: Any = None, **head: Any) -> Note:
        place = open_place(str(self.sites[name]))
        note = Note(kind, {"run": RUN, "version": fedgrove.__version__, **head}, body or {})
        return decode(Runtime(place, self.workshops[name]).handle(encode(note)))

    def refused(self, answer: Note) -> str:
        assert answer.kind == "error", answer.head
        return str(answer.head["sentence"])

    def each(self, kind: str, heads: Any) -> Any:
        for name, head in heads.items():
            answer = self.ask(name, kind, **head)
            if answer.kind == "error":
                yield name, Failure(str(answer.head["sentence"]))
            else:
                yield name, answer

    def round(self, number: int = 1) -> MaskedRound:
        """A round whose keys and shares were exchanged."""
        masks = MaskedRound(self.job, RUN, self.parts.method, number, self.infos)
        assert list(masks.meet(self.each)) == []
        return masks

    def offer(self) -> dict[str, Any]:
        method = self.parts.method
        state = method.open(method.begin(self.infos), 1)
        return self.parts.head.beside(method.offer(state, 1, self.infos[0]), None, newcomer=False)

    def train(self, name: str, **head: Any) -> Note:
        return self.ask(name, "train", {"offer": self.offer()}, store=0, keep=0, **head)


@pytest.fixture
def server(tiny_bert: Path, tmp_path: Path) -> Server:
    found = Server(tmp_path, tiny_bert)
    found.open()
    return found


def test_init_gives_every_site_the_others_public_keys(tmp_path: Path, tiny_bert: Path) -> None:
    server = Server(tmp_path, tiny_bert)
    for name, site in server.sites.items():
        assert sorted(path.stem for path in (site / "keys").iterdir()) == NAMES
        place = open_place(str(site)).identity(RUN)
        others = [open_place(str(server.sites[other])).identity(RUN) for other in NAMES]
        for other, identity in zip(NAMES, others, strict=True):
            assert place.signed(other, b"message", identity.sign(b"message")), (name, other)
        assert not place.signed("site-0", b"another", others[0].sign(b"message"))
    found = check(server.sites["site-0"], job=tmp_path / "job.toml")
    assert any("knows the keys of site-1, site-2" in str(each) for each in found)


def test_a_site_that_knows_nobody_says_what_to_do(server: Server) -> None:
    for path in (server.sites["site-0"] / "keys").iterdir():
        path.unlink()
    answer = server.ask("site-0", "keys", round=1, attempt="x")
    assert "keys/ has no other site's public key" in server.refused(answer)
    found = check(server.sites["site-0"], job=server.folder / "job.toml")
    assert any("masks updates" in str(each) and not each.ok for each in found)
    admit_key(server.sites["site-0"], "site-1", server.sites["site-1"] / "node.pub")
    assert server.ask("site-0", "keys", round=1, attempt="x").kind == "keys"


def test_a_key_that_a_site_does_not_know_stops_it(server: Server) -> None:
    """The operator admits a new key of site-1: at the server alone it is worth nothing."""
    make_key(server.sites["site-1"], "site-1", force=True)
    masks = MaskedRound(server.job, RUN, server.parts.method, 1, server.infos)
    lost: list[str] = []
    with pytest.raises(SecureError, match="1 of 3 clients sent shares"):
        lost.extend(absence.reason for absence in masks.meet(server.each))
    assert len(lost) == 2
    assert all("keys of 'site-1' are not signed by it" in reason for reason in lost)


def test_three_sites_mask_and_the_sum_opens(server: Server) -> None:
    masks = server.round()
    memory = server.sites["site-0"] / "runs" / RUN / "masks.json"
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600
    method, head = server.parts.method, server.parts.head
    masks.expect(method, head, server.infos[0], server.offer())
    updates = []
    for info in server.infos:
        answer = server.train(info.name, **masks.beside(info.name))
        content = answer.body["update"]
        assert masks.fault(content) is None
        again = server.train(info.name, **masks.beside(info.name))
        assert bool((again.body["update"]["masked"] == content["masked"]).all())
        updates.append(Update(info.name, info.examples, content, 2))
    opened = masks.opened(updates, server.each)
    assert opened.clients == 3
    assert 0 < float(opened.steps.abs().max()) < 2**31
    assert json.loads((memory.parent / "opened.json").read_text()).keys() == {"1"}
    # the same round once more, with one site fewer: the difference would be its update
    later = MaskedRound(server.job, RUN, method, 1, server.infos[:2])
    list(later.meet(server.each))
    later.expect(method, head, server.infos[0], server.offer())
    for info in server.infos[:2]:
        server.train(info.name, **later.beside(info.name))
    sentences = [
        server.refused(
            server.ask(name, "unmask", round=1, attempt=later.terms.attempt,
                       opening={"round": 1, "present": ["site-0", "site-1"], "gone": []})
        )
        for name in ("site-0", "site-1")
    ]  # fmt: skip
    assert all("with other clients in it" in sentence for sentence in sentences)


def test_an_update_without_masks_is_not_given(server: Server) -> None:
    assert "no keys for this attempt" in server.refused(server.train("site-0", round=1))
    masks = server.round()
    head = masks.beside("site-0")
    assert "has no mail" in server.refused(server.train("site-0", **{**head, "mail": None}))
    assert "not weigh clients" in server.refused(server.train("site-0", **{**head, "scale": 100}))
    other = {**head, "round": 2}
    assert "no keys for this attempt at round 2" in server.refused(server.train("site-0", **other))
    assert not list(server.folder.rglob("store-*"))


def test_another_offer_under_the_same_masks_is_refused(server: Server) -> None:
    head = server.round().beside("site-0")
    assert server.train("site-0", **head).kind == "train"
    offer = server.offer()
    for factors in offer["method"].whole.values():
        factors.B.add_(0.5)
    answer = server.ask("site-0", "train", {"offer": offer}, store=0, keep=0, **head)
    assert "a second update under the masks" in server.refused(answer)


def test_a_question_for_both_secrets_of_a_site_is_refused(server: Server) -> None:
    masks = server.round()
    head = {"round": 1, "attempt": masks.terms.attempt}
    opening = {"round": 1, "present": NAMES, "gone": []}
    answer = server.ask("site-0", "unmask", **head, opening=opening)
    assert "sent no masked update" in server.refused(answer)
    server.train("site-0", **masks.beside("site-0"))
    both = {"round": 1, "present": NAMES, "gone": ["site-1"]}
    answer = server.ask("site-0", "unmask", **head, opening=both)
    assert "both secrets of 'site-1'" in server.refused(answer)
    assert server.ask("site-0", "unmask", **head, opening=opening).kind == "unmask"
    turned = {"round": 1, "present": ["site-0", "site-2"], "gone": ["site-1"]}
    answer = server.ask("site-0", "unmask", **head, opening=turned)
    assert "a second time" in server.refused(answer)
    # and after new keys of the same round, as a server that replays it would ask
    answer = server.ask("site-0", "unmask", round=1, attempt="another", opening=turned)
    assert "no keys for this attempt" in server.refused(answer)


def test_a_job_without_masks_has_no_exchanges(tiny_bert: Path, tmp_path: Path) -> None:
    found = Server(tmp_path, tiny_bert, privacy={"secure_aggregation": False})
    found.open()
    answer = found.ask("site-0", "keys", round=1, attempt="x")
    assert "no secure aggregation" in found.refused(answer)


def test_a_site_counts_by_itself_who_shares_the_noise(tiny_bert: Path, tmp_path: Path) -> None:
    privacy = {"client_noise": 1.0}
    found = Server(tmp_path, tiny_bert, privacy=privacy, federation={"min_clients": 3})
    found.open()
    own = found.ask("site-0", "keys", round=1, attempt="x").head["advert"]
    roll = {"round": 1, "size": 1000, "adverts": [own]}
    answer = found.ask("site-0", "shares", round=1, attempt="x", roll=roll)
    assert "sees the keys of 1 of 1000 clients" in found.refused(answer)


def test_a_run_between_sites_on_a_grid(tiny_bert: Path, tmp_path: Path) -> None:
    """The whole loop, the sites' own keys."""
    from fedgrove.deploy.strategy import on_grid

    found = Server(tmp_path, tiny_bert, federation={"min_clients": 3}, run={"rounds": 2})
    configs = {n + 1: {"site": str(found.sites[name])} for n, name in enumerate(NAMES)}
    grid = FakeGrid(3, configs=configs)
    job = Job.load(tmp_path / "job.toml")
    names = dict(enumerate(NAMES, start=1))
    on_grid(grid, job, tmp_path / "out", resume=False, names=names)
    sent = [decode(blob) for direction, blob in grid.blobs if direction == "up"]
    updates = [note.body["update"] for note in sent if note.kind == "train"]
    assert len(updates) == 6
    assert all(set(update) == {"masked"} for update in updates)
