"""Vertical runs on small tables: joined rows, resumed bytes, skipped batches, privacy, the page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.vertical.made import ROWS, job, rows, save, save_parties

from fedgrove.ground.errors import DataError, JobError, RunError
from fedgrove.vertical import VerticalJob, course, run
from fedgrove.vertical.messages import Message
from fedgrove.vertical.party import Columns
from fedgrove.vertical.server import Vim
from fedgrove.vertical.start import effort_of
from fedgrove.vertical.tables import entities


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves, but what names the machine."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Most tests are not about the page, whose figures take most of their time."""
    if "page" not in request.keywords and "page" not in request.node.name:
        monkeypatch.setattr("fedgrove.vertical.start.write_page", lambda folder: folder)


# ----------------------------------------------------------------------- what is learnt
@pytest.mark.parametrize("method", ["vim", "vim-j", "split"])
def test_together_is_worth_more_than_alone(tmp_path: Path, method: str) -> None:
    save_parties(tmp_path, rows(120))
    chosen = job(tmp_path, method={"name": method}, train={"epochs": 12, "lr": 0.5})
    found = run(chosen, tmp_path / "out").summary
    alone = [party["alone"] for party in found["parties"].values()]
    assert found["accuracy"] >= max(alone) + 0.1
    assert found["accuracy"] > 0.85
    lost = {name: found["accuracy"] - party["without"] for name, party in found["parties"].items()}
    assert min(lost["clinic"], lost["lab"]) > 0.1
    assert lost["other"] < 0.06


def test_a_linear_party_of_noise_has_the_least_norm(tmp_path: Path) -> None:
    save_parties(tmp_path, rows(120))
    chosen = job(tmp_path, method={"name": "vim-j"}, train={"epochs": 12}, run={"alone": False})
    values = chosen.to_dict()
    for party in values["party"].values():
        party["width"] = 0
    found = run(VerticalJob.build(values, folder=tmp_path), tmp_path / "out").summary
    norms = {name: party["importance"] for name, party in found["parties"].items()}
    assert norms["other"] < min(norms["clinic"], norms["lab"]) / 2


def test_a_party_with_nothing_but_the_labels(tmp_path: Path) -> None:
    save_parties(tmp_path)
    save(tmp_path / "labels.csv", rows(), ["id", "label"])
    chosen = job(
        tmp_path,
        data={"labels": "payer"},
        party={"payer": {"path": "labels.csv"}},
        run={"alone": False},
    )
    found = run(chosen, tmp_path / "out").summary
    assert list(found["parties"]) == ["clinic", "lab", "other"]
    assert [party["alone"] for party in found["parties"].values()] == [None] * 3


# ---------------------------------------------------------------------------- joining
def test_shuffled_rows_change_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        save_parties(folder)
    for name, columns in (("clinic", ["id", "a", "label"]), ("lab", ["id", "b"])):
        shuffled = rows()
        random.Random(name).shuffle(shuffled)
        save(two / f"{name}.csv", shuffled, columns)
    first = run(job(one), tmp_path / "a").path
    second = run(job(two), tmp_path / "b").path
    assert bytes_of(first) == bytes_of(second)


def test_missing_entities_are_refused_or_left_out(tmp_path: Path) -> None:
    save_parties(tmp_path)
    save(tmp_path / "lab.csv", rows()[3:], ["id", "b"])
    with pytest.raises(DataError) as refused:
        run(job(tmp_path), tmp_path / "out")
    assert str(refused.value) == (
        '3 of the 60 ids of "clinic" and 3 of the 60 ids of "other" are missing at another party; '
        'complete the tables, or leave such entities out with data.unmatched = "drop".'
    )
    assert not (tmp_path / "out").exists()
    found = run(job(tmp_path, data={"unmatched": "drop"}), tmp_path / "out").summary
    assert found["entities"] == ROWS - 3
    left = {name: party["left_out"] for name, party in found["parties"].items()}
    assert left == {"clinic": 3, "lab": 0, "other": 3}


def spoiled(folder: Path, **change: Any) -> None:
    """lab.csv with one row changed."""
    table = rows()
    table[7] |= change
    save(folder / "lab.csv", table, ["id", "b"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "p3"}, 'party "lab": the id "p3" stands twice, in'),
        ({"id": ""}, 'party "lab": an entity without an id:'),
        ({"b": ""}, 'lab.csv, line 9: the column "b" has "", which is no finite number'),
        ({"b": "nan"}, 'the column "b" has "nan", which is no finite number'),
        ({"b": "many"}, 'the column "b" has "many", which is no finite number'),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    save_parties(tmp_path)
    spoiled(tmp_path, **change)
    with pytest.raises(DataError) as refused:
        run(job(tmp_path), tmp_path / "out")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_no_entity_in_common(tmp_path: Path) -> None:
    save_parties(tmp_path)
    other = [row | {"id": f"x{number}"} for number, row in enumerate(rows())]
    save(tmp_path / "lab.csv", other, ["id", "b"])
    with pytest.raises(DataError, match="No id is at all parties"):
        run(job(tmp_path, data={"unmatched": "drop"}), tmp_path / "out")


def test_row_numbers_are_ids_only_of_equal_tables(tmp_path: Path) -> None:
    save_parties(tmp_path)
    whole = job(tmp_path, data={"id": None})
    assert len(entities(whole).labels) == ROWS
    save(tmp_path / "lab.csv", rows()[1:], ["id", "b"])
    with pytest.raises(DataError, match=r"unequal numbers of rows \(clinic 60, lab 59, other 60\)"):
        run(whole, tmp_path / "out")


def test_the_parties_key_is_read_and_must_be_long(tmp_path: Path) -> None:
    save_parties(tmp_path)
    keyed = job(tmp_path, data={"key": "join.key"})
    with pytest.raises(DataError, match=r"data\.key: .*join\.key cannot be read"):
        run(keyed, tmp_path / "out")
    (tmp_path / "join.key").write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes; ids need a key of 16 or more"):
        run(keyed, tmp_path / "out")
    (tmp_path / "join.key").write_bytes(b"0123456789abcdef")
    assert entities(keyed).joined.keys != entities(job(tmp_path)).joined.keys


def test_labels_must_be_something_to_learn(tmp_path: Path) -> None:
    save_parties(tmp_path, [row | {"label": "ill"} for row in rows()])
    with pytest.raises(DataError, match="one value in all training entities"):
        run(job(tmp_path), tmp_path / "out")
    save_parties(tmp_path, rows(3))
    with pytest.raises(DataError, match="3 entities leave none"):
        run(job(tmp_path, data={"test": 0.1}), tmp_path / "out")


def test_flower_is_refused_with_a_reason(tmp_path: Path) -> None:
    save_parties(tmp_path)
    with pytest.raises(JobError, match="a message for every batch"):
        run(job(tmp_path), tmp_path / "out", engine="flower")
    with pytest.raises(JobError, match="no engine 'mpi'"):
        run(job(tmp_path), tmp_path / "out", engine="mpi")


# --------------------------------------------------------------------- stopped, resumed
class Stop(Exception):
    """The process is killed here."""


@pytest.mark.parametrize("method", ["vim", "vim-j", "split"])
@pytest.mark.parametrize("batch", [2, 7, 8])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, batch: int
) -> None:
    save_parties(tmp_path)
    chosen = job(
        tmp_path,
        method={"name": method},
        run={"alone": batch == 7},
        privacy={"clip": 5.0, "noise": 0.5, "randomness": "seed"},
    )
    whole = bytes_of(run(chosen, tmp_path / "whole").path)
    count = 0
    real = course.carried_down

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3 * batch:
            raise Stop
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(course, "carried_down", counted)
        with pytest.raises(Stop):
            run(chosen, tmp_path / "stopped")
    with pytest.raises(RunError, match="continue a run with --resume"):
        run(chosen, tmp_path / "stopped")
    with pytest.raises(RunError, match=r"holds another job \(method.rho differ\)"):
        run(
            job(
                tmp_path,
                method={"name": method, "rho": 3.0},
                run={"alone": batch == 7},
                privacy={"clip": 5.0, "noise": 0.5, "randomness": "seed"},
            ),
            tmp_path / "stopped",
            resume=True,
        )
    assert bytes_of(run(chosen, tmp_path / "stopped", resume=True).path) == whole
    # a finished one is left as it is
    assert bytes_of(run(chosen, tmp_path / "stopped", resume=True).path) == whole


def test_changed_data_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_parties(tmp_path)

    def stop(*given: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(course, "carried_down", stop)
        with pytest.raises(Stop):
            run(job(tmp_path), tmp_path / "out")
    spoiled(tmp_path, b=77.0)
    with pytest.raises(RunError, match="The data changed since"):
        run(job(tmp_path), tmp_path / "out", resume=True)


# ------------------------------------------------------------------------ what goes wrong
def test_a_message_that_is_not_finite_skips_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_parties(tmp_path)
    real = Columns.speak
    duals: list[torch.Tensor] = []

    def speak(self: Columns, rows: Any) -> Message:
        message = real(self, rows)
        if self.name == "lab" and len(rows) == 13:  # the last batch of the training entities
            return Message(message.rows * float("nan"))
        return message

    def remember(self: course.Course, *given: Any) -> Any:
        assert isinstance(self.server, Vim)
        duals.append(self.server.duals.clone())
        return measured(self, *given)

    measured = course.Course._measured
    monkeypatch.setattr(Columns, "speak", speak)
    monkeypatch.setattr(course.Course, "_measured", remember)
    out = tmp_path / "out"
    found = run(job(tmp_path, run={"alone": False}), out).summary
    assert found["skipped"] == 3
    first, *_ = (out / "together" / "events.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "round": 1,
        "event": "skipped",
        "batch": 2,
        "party": "lab",
        "why": "its message is not finite",
    }
    train = entities(job(tmp_path)).train
    assert float(duals[0][train[32:]].abs().max()) == 0  # the multipliers of these stay
    assert float(duals[0][train[:32]].abs().min(dim=-1).values.max()) > 0


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    save_parties(tmp_path)
    wild = job(tmp_path, train={"lr": 1e12, "epochs": 8}, method={"name": "vim-j"})
    with pytest.raises(RunError, match=r"the training diverged; lower train\.lr"):
        run(wild, tmp_path / "out")


# ------------------------------------------------------------------------------- privacy
def test_every_message_is_clipped_as_a_whole_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dp_accounting import GaussianDpEvent, rdp

    save_parties(tmp_path)
    norms = []
    real = course.carried_up

    def seen(message: Message, *given: Any) -> Message:
        norms.append(float(message.rows.double().norm()))
        return real(message, *given)

    monkeypatch.setattr(course, "carried_up", seen)
    run(job(tmp_path, run={"alone": False}, privacy={"clip": 0.7}), tmp_path / "clipped")
    assert max(norms) == pytest.approx(0.7, abs=1e-6)
    assert sum(norm < 0.69 for norm in norms) < len(norms) / 2
    private = {"clip": 0.7, "noise": 4.0, "delta": 1e-4}
    found = run(job(tmp_path, run={"alone": False}, privacy=private), tmp_path / "noisy").summary
    # three epochs of three batches, and the test entities in one after each
    assert found["privacy"]["messages"] == 3 * (3 + 1)
    accountant = rdp.RdpAccountant()
    accountant.compose(GaussianDpEvent(4.0), 12)
    assert found["privacy"]["epsilon"] == pytest.approx(accountant.get_epsilon(1e-4), rel=0.02)
    noise = [norm for norm in norms if norm > 0.71]
    expected = 4.0 * 0.7 * (16 * 4) ** 0.5
    assert sum(noise) / len(noise) == pytest.approx(expected, rel=0.15)


def test_noise_of_a_secret_differs_and_of_the_seed_repeats(tmp_path: Path) -> None:
    save_parties(tmp_path)
    losses = {}
    for name, randomness in (("a", "seed"), ("b", "seed"), ("c", "secret"), ("d", "secret")):
        private = {"clip": 1.0, "noise": 1.0, "randomness": randomness}
        chosen = job(tmp_path, run={"alone": False}, privacy=private)
        losses[name] = run(chosen, tmp_path / name).summary["loss"]
    assert losses["a"] == losses["b"]
    assert losses["c"] != losses["d"]
    assert (tmp_path / "c" / "privacy.key").stat().st_mode & 0o077 == 0


def test_a_guarded_party_does_not_tell_its_norm_beside_its_messages(tmp_path: Path) -> None:
    save_parties(tmp_path)
    chosen = job(
        tmp_path,
        method={"name": "vim-j"},
        run={"alone": False},
        privacy={"clip": 1.0, "noise": 1.0},
    )
    found = run(chosen, tmp_path / "out").summary
    assert {party["importance"] for party in found["parties"].values()} == {None}


# --------------------------------------------------------------------------- what leaves
def test_the_parties_files_add_up_to_the_reported_accuracy(tmp_path: Path) -> None:
    save_parties(tmp_path)
    chosen = job(tmp_path, run={"alone": False}, train={"epochs": 6})
    done = run(chosen, tmp_path / "out")
    joined = entities(chosen)
    sums = torch.zeros(len(joined.labels), 2)
    for name, section in chosen.speaking.items():
        folder = done.path / "parties" / name
        card = json.loads((folder / "party.json").read_text())
        assert "predicts nothing alone" in card["needs_the_others"]
        assert card["share"] == "relu([(x - mean) / spread, 1] @ V) @ W"
        held = load_file(folder / "party.safetensors")
        table = [
            [float(row[column]) for column in card["columns"]] for row in joined.tables[name].rows
        ]
        x = (torch.tensor(table, dtype=torch.float64) - held["mean"]) / held["spread"]
        x = torch.cat([x, torch.ones(len(x), 1)], 1).float()
        sums = sums + torch.relu(x @ held["V"]) @ held["W"]
        assert section.columns == tuple(card["columns"])
    right = sums.argmax(-1) == joined.labels
    assert float(right[list(joined.test)].double().mean()) == done.summary["accuracy"]


def test_the_page_shows_each_party(tmp_path: Path) -> None:
    save_parties(tmp_path)
    out = run(job(tmp_path), tmp_path / "out").path
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in (
        "What joining is worth",
        "How much the sum listens to each party",
        "Over epochs",
        "no private set intersection",
        "every party learns the training labels",
        "<svg",
    ):
        assert words in page
    assert "could not be drawn" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert sorted(file.name for file in (out / "figures").iterdir()) == [
        "vertical-1.png",
        "vertical-2.png",
        "vertical-4.png",
    ]


# -------------------------------------------------------------------------------- keys
def test_the_method_sets_a_partys_work(tmp_path: Path) -> None:
    plain = effort_of(job(tmp_path), 3)
    assert (plain.steps, plain.rho, plain.damp, plain.head_lr) == (5, 1.0, 0.0, 0.1)
    held = {"prox": True, "rho": 0.5, "local_steps": 2}
    damped = effort_of(job(tmp_path, method=held, train={"head_lr": 0.4}), 3)
    assert (damped.steps, damped.damp, damped.head_lr) == (2, 1.0, 0.4)
    assert effort_of(job(tmp_path, method=held), 1).damp == 0
    assert effort_of(job(tmp_path, method={"name": "split"}), 3).steps == 1


def test_evaluations_and_the_split_follow_their_keys(tmp_path: Path) -> None:
    save_parties(tmp_path)
    chosen = job(tmp_path, run={"eval_every": 2, "alone": False}, train={"epochs": 5})
    run(chosen, tmp_path / "out")
    text = (tmp_path / "out" / "together" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["round"] for line in lines if "accuracy" in line] == [2, 4]
    first, second = entities(chosen), entities(job(tmp_path, run={"seed": 1}))
    assert len(first.test) == 15
    assert first.test != second.test
    assert not set(first.test) & set(first.train)
