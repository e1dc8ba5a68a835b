from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import tiny_job

from fedgrove.cli import main
from fedgrove.federation import build
from fedgrove.interop.lengths import lengths


def test_lengths_of_generation_rows(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "what is " * n, "completion": "good"} for n in (1, 2, 3, 20)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    job = tiny_job(tiny_llama, tmp_path, data={"task": "generate", "max_length": 16})
    # <|user|> ... <|end|> <|assistant|> good <|end|>
    assert lengths(job, build(job)) == {
        "a": {"median": 10.0, "p95": pytest.approx(39.9), "longest": 45, "cut": 1}
    }


def test_lengths_of_texts_include_special_tokens(tiny_bert: Path, silos: Path) -> None:
    job = tiny_job(tiny_bert, silos, data={"max_length": 10})
    federation = build(job)
    found = lengths(job, federation)
    client = federation.clients[0]
    words = [len(row["text"].split()) + 2 for row in [*client.train, *client.test]]
    assert found["site-0"]["longest"] == max(words)
    assert found["site-0"]["cut"] == sum(count > 10 for count in words) > 0


def test_the_command_shows_them(
    tiny_llama: Path, exchanges: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "data.source=silos",
        f"data.path={exchanges}",
        "data.task=generate",
        f"model.name={tiny_llama}",
    ]
    flags = [flag for setting in [*settings, "data.max_length=13"] for flag in ("--set", setting)]
    assert main(["data", *flags, "--tokens"]) == 0
    out = capsys.readouterr().out
    heading = "client train test median words median tokens p95 over 13"
    assert out.splitlines()[0].split() == heading.split()
    total = 24 + 28 + 32
    assert f"of {total} rows are longer than data.max_length = 13 and will be cut." in out
    assert main(["data", *flags]) == 0
    assert "tokens" not in capsys.readouterr().out


def test_images_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny import save_pictures, save_vit

    pictures, vit = (
        save_pictures(tmp_path / "pictures", clients=2, images=4),
        save_vit(tmp_path / "vit"),
    )
    settings = [
        "data.source=silos",
        f"data.path={pictures}",
        "data.task=classify-images",
        f"model.name={vit}",
    ]
    assert (
        main(["data", *[flag for setting in settings for flag in ("--set", setting)], "--tokens"])
        == 0
    )
    out = capsys.readouterr().out
    assert "pixels" in out.splitlines()[0]
    assert "This task's rows have no length in tokens: nothing is cut." in out
