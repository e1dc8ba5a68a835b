"""The site file: what it accepts, what a site refuses, and that it reads its data as the silos
would be read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_job

import fedgrove
from fedgrove.adapters.adapter import Factors, Site
from fedgrove.deploy.audit import read
from fedgrove.deploy.certificates import DeployError
from fedgrove.deploy.site import SitePlace, SiteRefusal, job_digest, open_place
from fedgrove.engines.flower.wire import Note, encode
from fedgrove.federation import build
from fedgrove.ground.errors import FedgroveError
from fedgrove.job import Job
from fedgrove.methods.contract import Setting
from fedgrove.methods.registry import method_class
from fedgrove.runs.prepare import machine_choices

LABELS = ["negative", "positive"]

FILE = """
[site]
name = "site-1"
server = "localhost:9443"

[data]
path = "{data}"

[budget]
rank = 4

[allow]
models = {{ "{model}" = "{model}" }}
methods = ["fedit", "fed*-lora", "local"]
targets = ["auto", "query"]
max_rank = 8
max_rounds = 10
max_local_steps = 20
"""


def write(folder: Path, bert: Path, silos: Path, *changes: tuple[str, str]) -> Path:
    text = FILE.format(data=silos / "site-1.jsonl", model=bert)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.toml").write_text(text, encoding="utf-8")
    return folder


def job(bert: Path, silos: Path, **changes: Any) -> Job:
    changes.setdefault("data", {}).setdefault("labels", LABELS)
    made: Job = tiny_job(bert, silos, **changes)
    return made


@pytest.fixture
def place(tiny_bert: Path, silos: Path, tmp_path: Path) -> SitePlace:
    return open_place(str(write(tmp_path / "site-1", tiny_bert, silos)))


# ------------------------------------------------------------ the file
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('name = "site-1"', 'name = "../site"'), "site.name"),
        (('server = "localhost:9443"', 'server = "localhost"'), "host:port"),
        (("max_rank = 8", "max_rnak = 8"), "max_rank"),
        (
            ("max_rounds = 10", "max_rounds = 0"),
            "allow.max_rounds must be an integer of at least 1, not 0",
        ),
        (("[allow]", "[allowed]"), "[allow]"),
        (('methods = ["fedit", "fed*-lora", "local"]', ""), "allow.methods is missing"),
        (("rank = 4", 'rank = "4"'), "budget.rank"),
        (("[data]", '[data]\ncolumns = { txt = "note" }'), "txt is no column of a job"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(
    change: tuple[str, str], words: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "s", tiny_bert, silos, change)
    with pytest.raises(FedgroveError) as caught:
        open_place(str(folder))
    assert words in str(caught.value)
    assert "site.toml" in str(caught.value)


def test_a_missing_file_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="fedgrove deploy init"):
        open_place(str(tmp_path))


# ------------------------------------------------------------ the allow-list
def test_what_is_allowed_is_admitted_with_the_sites_own_settings(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "models"
    own = [
        (f'"{tiny_bert}" = "{tiny_bert}"', f'"{tiny_bert}" = "{elsewhere}"'),
        ("rank = 4", 'rank = 4\nthreads = 3\ndevice = "cpu"'),
        ("[data]", '[data]\ncolumns = { text = "note", label = "code" }'),
    ]
    here = open_place(str(write(tmp_path / "s", tiny_bert, silos, *own)))
    admitted = here.admit(job(tiny_bert, silos, train={"device": "auto"}))
    assert admitted.model.name == str(elsewhere)
    assert (admitted.train.threads, admitted.train.device) == (3, "cpu")
    assert (admitted.data.text, admitted.data.label) == ("note", "code")
    assert here.rank(admitted) == 4


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"name": "minilm"}}, "the base model 'minilm' is not allowed here"),
    ({"method": {"name": "hilora"}}, "the method 'hilora' is not allowed here"),
    ({"lora": {"rank": 4, "targets": ["query", "value"]}}, "lora.targets has 'value'"),
    ({"lora": {"rank": 9}}, "lora.rank = 9 is above the largest allowed here, 8"),
    ({"run": {"rounds": 11}}, "run.rounds = 11"),
    ({"train": {"local_steps": 21}}, "train.local_steps = 21"),
    ({"federation": {"head": "shared"}}, "head to the server"),
    ({"federation": {"newcomer_head": True}}, "head to the server"),
    ({"data": {"labels": None}}, "set data.labels"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_is_not_allowed_is_refused_with_the_sites_name(
    changes: dict[str, Any], words: str, place: SitePlace, tiny_bert: Path, silos: Path
) -> None:
    asked = {
        section: {k: v for k, v in keys.items() if v is not None}
        for section, keys in changes.items()
    }
    made = job(tiny_bert, silos, **asked)
    if changes.get("data") == {"labels": None}:
        made = made.replace(data={"labels": None})
    with pytest.raises(SiteRefusal) as caught:
        place.admit(made)
    assert words in str(caught.value)
    assert str(caught.value).startswith("site-1 refuses: ")


def test_the_head_leaves_where_the_site_says_so(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    folder = write(
        tmp_path / "s", tiny_bert, silos, ("max_rank = 8", "max_rank = 8\nshare_head = true")
    )
    open_place(str(folder)).admit(job(tiny_bert, silos, federation={"head": "shared"}))


def test_only_named_jobs_where_the_site_names_them(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    mine = job(tiny_bert, silos)
    folder = write(
        tmp_path / "s", tiny_bert, silos, ("[allow]", f'[allow]\njobs = ["{job_digest(mine)}"]')
    )
    here = open_place(str(folder))
    here.admit(mine)
    pytest.importorskip("flwr")
    from fedgrove.engines.flower.deployable import deployable

    here.admit(deployable(machine_choices(mine.resolved())))  # as the server sends it
    with pytest.raises(SiteRefusal, match="not among the jobs"):
        here.admit(mine.replace(train={"lr": 0.1}))


def test_any_layer_and_any_method_with_a_star(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    stars = [
        ('targets = ["auto", "query"]', 'targets = ["*"]'),
        ('["fedit", "fed*-lora", "local"]', '["*"]'),
    ]
    here = open_place(str(write(tmp_path / "s", tiny_bert, silos, *stars)))
    here.admit(
        job(tiny_bert, silos, method={"name": "hilora"}, lora={"rank": 4, "targets": ["value"]})
    )


# ------------------------------------------------------------ the data
def test_the_rows_are_read_and_split_as_a_silo_of_that_name(
    place: SitePlace, tiny_bert: Path, silos: Path
) -> None:
    made = job(tiny_bert, silos, data={"validation_fraction": 0.1, "train_examples": 10})
    silo = next(client for client in build(made).clients if client.name == "site-1")
    assert place.client(place.admit(made)) == silo


def test_columns_and_labels_of_its_own_file(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    rows = ["note,code", *(f"text {n},{'yes' if n % 2 else 'no'}" for n in range(8))]
    folder = write(
        tmp_path / "s",
        tiny_bert,
        silos,
        ("[data]", '[data]\ncolumns = { text = "note", label = "code" }'),
    )
    text = (folder / "site.toml").read_text().replace(str(silos / "site-1.jsonl"), "own.csv")
    (folder / "site.toml").write_text(text)
    (folder / "own.csv").write_text("\n".join(rows) + "\n")
    here = open_place(str(folder))
    client = here.client(here.admit(job(tiny_bert, silos, data={"labels": ["no", "yes"]})))
    assert len(client.train) + len(client.test) == 8
    with pytest.raises(FedgroveError, match=r"data\.labels"):
        here.client(here.admit(job(tiny_bert, silos, data={"labels": LABELS})))


def test_a_column_that_the_site_does_not_name_is_not_read(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """Else a server could train on whatever stands beside the text in a site's table."""
    named = ("[data]", '[data]\ncolumns = { text = "text", label = "label" }')
    here = open_place(str(write(tmp_path / "s", tiny_bert, silos, named)))
    here.admit(job(tiny_bert, silos))
    generate = {"task": "generate", "prompt": "text", "labels": None}
    for asked, column in (({"pair": "name"}, "name"), (generate, "completion")):
        other = job(tiny_bert, silos).replace(data=asked)
        with pytest.raises(
            SiteRefusal, match=f"reads the column '{column}'; data.columns names only label, text"
        ):
            here.admit(other)
        open_place(str(write(tmp_path / "open", tiny_bert, silos))).admit(other)


def test_epochs_count_as_the_sites_own_steps(
    place: SitePlace, tiny_bert: Path, silos: Path
) -> None:
    few = job(tiny_bert, silos, train={"local_steps": None, "local_epochs": 3})
    place.client(place.admit(few))
    for key in ("local_epochs", "final_local_epochs"):
        steps = {"local_steps": None} if key == "local_epochs" else {}
        many = job(tiny_bert, silos, train={**steps, key: 9})
        with pytest.raises(SiteRefusal, match=f"{key} = 9 takes [0-9]+ steps"):
            place.client(place.admit(many))


# ------------------------------------------------------------ messages
def test_every_message_is_logged_and_a_bad_one_is_logged_and_refused(place: SitePlace) -> None:
    sites = {"layer.0": Site("layer.0", 0, 6, 5)}
    fedit = method_class("fedit")
    setting = Setting(sites=sites, rank=2, alpha=4.0, rounds=4, seed=0)
    method = fedit(fedit.Options(), setting)
    good = Note(
        "train",
        {"run": "ab12", "round": 3},
        {"offer": {"layer.0": Factors(torch.ones(2, 6), torch.ones(5, 2), 1.0)}},
    )
    bad = Note(
        "train",
        {"run": "ab12", "round": 4},
        {"offer": {"layer.0": Factors(torch.ones(2, 7), torch.ones(5, 2), 1.0)}},
    )
    place.received(good, encode(good), method)
    place.sending(
        Note("train", {"run": "ab12"}, {}), b"answer"
    )  # an answer belongs to the round of its question
    with pytest.raises(SiteRefusal, match="6 features"):
        place.received(bad, encode(bad), method)
    entries = list(read(place.folder / "audit.jsonl"))
    assert [(e.direction, e.round, bool(e.note)) for e in entries] == [
        ("received", 3, False),
        ("sent", 3, False),
        ("received", 4, True),
    ]
    assert entries[0].bytes == len(encode(good))


def test_what_it_tells_of_its_data(
    tiny_bert: Path, silos: Path, tmp_path: Path, place: SitePlace
) -> None:
    row = {"name": "site-1", "train": 20, "labels": {"positive": 12}, "median_words": 7.0}
    assert place.tells(row) == {"name": "site-1", "train": 20, "labels": {}}
    folder = write(tmp_path / "s", tiny_bert, silos, ("[allow]", "[allow]\nshare_counts = true"))
    assert open_place(str(folder)).tells(row) == row


def test_the_measures_of_a_finished_run_stay_too(place: SitePlace) -> None:
    (place.folder / "runs" / "ab12").mkdir(parents=True)
    place.sending(Note("finish", {"run": "ab12", "row": {"metric": 0.75}}, {}), b"answer")
    assert json.loads((place.folder / "runs" / "ab12" / "measures.json").read_text()) == {
        "metric": 0.75
    }


@pytest.mark.parametrize("run", ["../../elsewhere", "", "a/b", 7, None])
def test_a_run_cannot_name_a_folder_elsewhere(run: Any, place: SitePlace) -> None:
    note = Note("train", {"run": run, "round": 1}, {})
    with pytest.raises(SiteRefusal, match="name its run"):
        place.received(note, b"", None)


def test_a_message_above_the_limit_is_neither_used_nor_sent(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "s", tiny_bert, silos, ("[allow]", "[allow]\nmax_message_mb = 0.001"))
    here = open_place(str(folder))
    note = Note("train", {"run": "ab", "round": 1}, {})
    here.received(note, bytes(1000), None)
    with pytest.raises(SiteRefusal, match="1,001 bytes"):
        here.received(note, bytes(1001), None)
    with pytest.raises(SiteRefusal, match="1,001 bytes"):
        here.sending(note, bytes(1001))


def hello(version: str) -> tuple[Note, bytes, None]:
    note = Note("hello", {"run": "ab", "version": version, "job": ""}, {})
    return note, encode(note), None


def test_the_servers_version(
    place: SitePlace, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    place.received(*hello(fedgrove.__version__))
    with pytest.raises(SiteRefusal, match=r"the server runs Fedgrove 9\.9 and this site"):
        place.received(*hello("9.9"))
    ranged = open_place(
        str(write(tmp_path / "s", tiny_bert, silos, ("[allow]", '[allow]\nfedgrove = ">=9,<10"')))
    )
    ranged.received(*hello("9.9"))
    with pytest.raises(SiteRefusal, match="this site allows >=9,<10"):
        ranged.received(*hello("10.0"))
    with pytest.raises(SiteRefusal, match="this site allows"):
        ranged.received(*hello(""))
    broken = open_place(
        str(write(tmp_path / "b", tiny_bert, silos, ("[allow]", '[allow]\nfedgrove = "about 9"')))
    )
    with pytest.raises(SiteRefusal, match="no range of versions"):
        broken.received(*hello("9.9"))
