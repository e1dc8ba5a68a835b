"""Parties of texts: LoRA on a base of their own, through the kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import BAD, GOOD, save_bert
from tests.vertical.made import job, rows, save, save_parties

from fedgrove.adapters.private import PrivacyError, unseal
from fedgrove.adapters.tree import leaves, pack
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.seeds import generator
from fedgrove.interop.peft import read_adapter
from fedgrove.vertical import course, run
from fedgrove.vertical.job import PartySection, VerticalTrainSection
from fedgrove.vertical.messages import Answer
from fedgrove.vertical.party import Effort, loss
from fedgrove.vertical.texts import Texts

EFFORT = Effort(steps=1, lr=1e-2, head_lr=1e-2, decay=0.0, rho=0.6)
WORDS = ["good film", "a sad day", "the book felt great", "very poor", "it was fine", "dark"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def party(bert: Path, effort: Effort = EFFORT, own: int | None = None) -> Texts:
    section = PartySection(path="x.csv", text="note", model=str(bert), rank=2, max_length=16)
    return Texts(
        "notes",
        effort,
        section,
        [{"text": text} for text in WORDS],
        classes=own,
        train=VerticalTrainSection(batch_size=8),
        seed=0,
        generator=generator(0, "notes"),
    )


def vector(one: Texts) -> torch.Tensor:
    return torch.cat([unseal(leaf).flatten().double() for _, leaf in leaves(one.store())])


def asked(one: Texts, answer: Answer) -> float:
    """The objective as it is now, from what the party would send."""
    share = one.speak(range(6)).rows
    if answer.weight is not None:
        share = share @ answer.weight
    return float(loss(share.double(), None, answer, one.effort))


@pytest.mark.parametrize("method", ["vim", "vim-j", "split"])
def test_a_small_step_lowers_the_objective_by_the_gradients_square(bert: Path, method: str) -> None:
    draw = torch.Generator().manual_seed(0)
    one = party(bert, own=3 if method == "vim-j" else None)
    if method == "vim":
        weight = torch.randn(one.width, 3, generator=draw)
        answer = Answer(
            torch.randn(6, 3, generator=draw), torch.randn(6, 3, generator=draw), weight
        )
    elif method == "vim-j":
        answer = Answer(torch.randn(6, 3, generator=draw), torch.randn(6, 3, generator=draw))
        one.fit(range(6), answer, "start")  # moves the weights off zero
    else:
        answer = Answer(torch.randn(6, one.width, generator=draw))
    before, value = vector(one), asked(one, answer)
    one.fit(range(6), answer, 1, 0)
    moved = float((vector(one) - before).square().sum())
    assert moved > 0
    # to first order the value falls by lr |g|², and the step is lr g
    assert value - asked(one, answer) == pytest.approx(moved / EFFORT.lr, rel=0.05)


def test_first_step_of_own_weights_is_the_formula(bert: Path) -> None:
    one = party(bert, own=3)
    draw = torch.Generator().manual_seed(0)
    dual, rest = torch.randn(6, 3, generator=draw), torch.randn(6, 3, generator=draw)
    h = one.embed(range(6))
    one.fit(range(6), Answer(dual, rest), 1, 0)
    expected = -EFFORT.head_lr * h.T @ (dual + EFFORT.rho * rest) / 6
    assert one.weight is not None
    assert torch.allclose(unseal(one.weight), expected, atol=1e-6)


def test_damping_holds_the_share_near_the_first(bert: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    answer = Answer(torch.randn(6, 3, generator=draw), torch.randn(6, 3, generator=draw))
    moved = []
    for damp in (0.0, 3.0):
        one = party(bert, replace(EFFORT, steps=8, damp=damp), own=3)
        first = one.speak(range(6)).rows
        one.fit(range(6), answer, 1, 0)
        moved.append(float((one.speak(range(6)).rows - first).norm()))
    assert moved[1] < moved[0] / 2


def test_an_adapter_cannot_be_sent(bert: Path) -> None:
    one = party(bert, own=3)
    with pytest.raises(PrivacyError):
        pack(one.store())
    one.fit(range(6), Answer(torch.ones(6, 3), torch.ones(6, 3)), 1, 0)
    with pytest.raises(PrivacyError):
        pack(one.store())


# ------------------------------------------------------------------------------- runs
def with_notes(folder: Path, bert: Path, count: int = 40, **changes: Any) -> Any:
    """The clinic's column, and notes at the lab that say what is left to know."""
    table = rows(count)
    for number, row in enumerate(table):
        words = GOOD if row["b"] > 0 else BAD
        row["note"] = f"the day was {words[number % 5]} and {words[(number + 2) % 5]}"
    save_parties(folder, table)
    save(folder / "notes.csv", table, ["id", "note"])
    notes = {"path": "notes.csv", "text": "note", "model": str(bert), "rank": 2, "max_length": 16}
    values = {
        "train": {"epochs": 2, "batch_size": 16, "lr": 0.3},
        "run": {"alone": False},
        **changes,
    }
    made = job(folder, **values).to_dict()
    made["party"] = {"clinic": made["party"]["clinic"], "notes": notes}
    return type(job(folder)).build(made, folder=folder)


@pytest.mark.parametrize("method", ["vim", "vim-j", "split"])
def test_a_killed_run_of_texts_goes_on_to_the_same_bytes(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("fedgrove.vertical.start.write_page", lambda folder: folder)
    chosen = with_notes(tmp_path, bert, method={"name": method})
    whole = run(chosen, tmp_path / "whole").path
    real = course.carried_down
    count = 0

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(course, "carried_down", counted)
        with pytest.raises(KeyboardInterrupt):
            run(chosen, tmp_path / "stopped")
    stopped = run(chosen, tmp_path / "stopped", resume=True).path
    for file in whole.rglob("*"):
        if file.is_file():
            assert (stopped / file.relative_to(whole)).read_bytes() == file.read_bytes(), file


def test_what_a_party_of_texts_leaves_gives_its_shares(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr("fedgrove.vertical.start.write_page", lambda folder: folder)
    spoken: list[torch.Tensor] = []
    real = Texts.embed

    def embed(self: Texts, places: Any) -> torch.Tensor:
        spoken.append(real(self, places))
        return spoken[-1]

    monkeypatch.setattr(Texts, "embed", embed)
    chosen = with_notes(tmp_path, bert)
    out = run(chosen, tmp_path / "out").path
    folder = out / "parties" / "notes"
    adapter, _, _ = read_adapter(folder)
    assert any(float(factors.B.abs().max()) > 0 for factors in adapter.values())
    (card,) = [json.loads(file.read_text()) for file in folder.glob("*.json") if "card" in file.name
               or file.name == "fedgrove.json"]  # fmt: skip
    assert "predicts nothing alone" in card["needs_the_others"]
    head = load_file(folder / "head.safetensors")
    assert head["weight"].shape == (2, 32)
    # the last message is that of the test entities, in their order
    from fedgrove.vertical.tables import entities

    joined = entities(chosen)
    texts = [joined.tables["notes"].rows[row]["note"] for row in joined.test]
    tokens = AutoTokenizer.from_pretrained(bert)(texts, padding=True, return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(bert), str(folder)).eval()
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    assert torch.allclose(pooled, spoken[-1], atol=1e-5)


def test_what_a_base_cannot_read_is_one_sentence(tmp_path: Path, bert: Path) -> None:
    chosen = with_notes(tmp_path, bert)
    long = with_keys(chosen, max_length=999)
    with pytest.raises(JobError, match=r"party\.notes\.max_length = 999 is more than .* reads"):
        run(long, tmp_path / "out")
    with pytest.raises(JobError, match=r"party\.notes\.rank = 64 is above 32"):
        run(with_keys(chosen, rank=64), tmp_path / "out")
    table = rows(40)
    for row in table:
        row["note"] = " " if row["id"] == "p5" else "good"
    save(tmp_path / "notes.csv", table, ["id", "note"])
    with pytest.raises(DataError, match=r"party \"notes\".*the column 'note' is empty"):
        run(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_keys(chosen: Any, **keys: Any) -> Any:
    """The job with other keys of the party of texts."""
    made = chosen.to_dict()
    made["party"]["notes"] |= keys
    return type(chosen).build(made, folder=chosen.folder)
