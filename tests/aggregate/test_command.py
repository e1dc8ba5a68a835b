"""The command itself: what it prints where, and that it leaves no trace beside its output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.aggregate.made import many

from fedgrove.cli import main


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, _ = many(tmp_path, [2, 3], [4.0, 3.0])
    save_file({"classifier.weight": torch.ones(2, 3)}, folders[0] / "head.safetensors")
    out = tmp_path / "out"
    arguments = [
        "flexlora",
        *map(str, folders),
        "--out",
        str(out),
        "--weights",
        "3,1",
        "--rank",
        "4",
    ]
    assert main(["aggregate", *arguments, "--previous", str(folders[0])]) == 0
    said = capsys.readouterr()
    assert said.err == "Checking adapters (3)\nAggregating sites (4)\n"
    *notes, lost, wrote = said.out.splitlines()
    assert notes == [
        "flexlora does not refer to the last round; --previous was not used.",
        "Left out, because not every client has it in one shape: classifier.weight.",
    ]
    assert lost.startswith("Lost against the mean of the updates (n_agg): ")
    assert wrote == f"Wrote {out}: _global/ and an adapter for each of 2 clients."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0", "c1", "out"]
    assert sorted(path.name for path in (out / "c0").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
