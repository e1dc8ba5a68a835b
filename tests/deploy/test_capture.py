"""What goes over the wire, written down and searched for private tensors and for the words of the
training texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.deploy.deployed import Deployment
from tests.deploy.test_sites import folders, grid, job_for, serve
from tests.engines.grid import FakeGrid, virtual

from fedgrove.adapters.private import is_private, unseal
from fedgrove.adapters.tree import leaves, unpack
from fedgrove.engines.flower.stores import Stores

__all__ = ["folders", "grid", "virtual"]

#: Methods with a part that stays at home: λ and B; the tree's other branches; B; the router and the
#: local adapter.
METHODS = ["hilora", "fedtreelora", "fedsa-lora", "fedalt"]
SECRET = "zq{site}x{row}v"  # a word of each row that is nowhere else


def with_secrets(file: Path) -> list[str]:
    """Put a word of its own into each row of a table; the words."""
    rows, words = [], []
    for number, line in enumerate(file.read_text().splitlines()):
        row = json.loads(line)
        words.append(SECRET.format(site=file.stem[-1], row=number))
        rows.append(json.dumps({**row, "text": f"{row['text']} {words[-1]}"}))
    file.write_text("\n".join(rows) + "\n")
    return words


def token_bytes(file: Path, bert: Path) -> dict[str, bytes]:
    """The rows as the model reads them, as arrays of both widths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(bert))
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    return {
        f"tokens of {text} as {kind}": torch.tensor(tokenizer(text)["input_ids"], dtype=kind)
        .numpy()
        .tobytes()
        for text in texts
        for kind in (torch.int64, torch.int32)
    }


def raw(tree: Any, *, private: bool) -> Iterator[tuple[str, bytes]]:
    """Tensors that say something (two numbers or more, not all the same), as the bytes that would
    travel.
    """
    for path, tensor in leaves(tree):
        if is_private(tensor) is private or (private and "/head/" in f"/{path}"):
            plain = unseal(tensor).detach().contiguous()
            if plain.numel() >= 2 and plain.unique().numel() > 1:
                yield path, plain.numpy().tobytes()


def found_in(content: bytes, wanted: dict[str, bytes]) -> list[str]:
    return [name for name, each in wanted.items() if each in content]


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("method", METHODS)
def test_nothing_private_and_no_text_is_in_any_message_of_a_run(
    method: str, grid: FakeGrid, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All messages both ways, against every private tensor that any site kept after any round."""
    private: dict[str, bytes] = {}
    save = Stores.save

    def kept(self: Stores, round: int, store: dict[str, Any], *, keep: int) -> None:
        for path, content in raw(store, private=True):
            private[f"{self.folder} {round} {path}"] = content
        save(self, round, store, keep=keep)

    monkeypatch.setattr(Stores, "save", kept)
    files = sorted((tmp_path / "silos").iterdir())
    words = [word for file in files for word in with_secrets(file)]
    tokens: dict[str, bytes] = {}
    for file in files:
        tokens |= token_bytes(file, tiny_bert)
    serve(
        grid,
        job_for(tiny_bert, tmp_path, method={"name": method}, run={"rounds": 4}),
        tmp_path / "out",
    )
    wire = b"\n".join(blob for _, blob in grid.blobs)
    assert len(private) > 12
    assert found_in(wire, private) == []
    assert found_in(wire, {word: word.encode() for word in words}) == []
    assert found_in(wire, tokens) == []
    assert b"negative" in wire, "the job's classes do travel, so the search can find something"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_nothing_private_and_no_text_passes_the_gate(
    method: str, tiny_bert: Path, tmp_path: Path
) -> None:
    """A real run; what is searched is all that TLS carried, at the one port that a server has."""
    with Deployment(
        tmp_path, tiny_bert, method={"name": method}, run={"rounds": 3, "eval_every": 3}
    ) as it:
        files = [it.site(name) / f"{name}.jsonl" for name in it.names]
        words = [word for file in files for word in with_secrets(file)]
        for name in it.names:
            it.start(name)
        it.start("server", str(tmp_path / "capture"), script=Path("tests/deploy/recording.py"))
        it.finish()
        wire = b"".join((tmp_path / "capture" / way).read_bytes() for way in ("up", "down"))
        private: dict[str, bytes] = {}
        travelled: dict[str, bytes] = {}
        for name in it.names:
            for store in (it.site(name) / "runs").rglob("store-*"):
                private |= {
                    f"{store} {path}": content
                    for path, content in raw(unpack(store.read_bytes()), private=True)
                }
        state = unpack(next((it.run / "checkpoints").rglob("server*")).read_bytes())
        travelled = dict(raw(state, private=False))
        assert private
        assert found_in(wire, private) == []
        assert found_in(wire, {word: word.encode() for word in words}) == []
        for file in files:
            assert found_in(wire, token_bytes(file, tiny_bert)) == []
        assert found_in(wire, travelled), (
            "what the server has must have come this way, so the search finds nothing"
        )
