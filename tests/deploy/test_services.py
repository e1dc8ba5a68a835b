"""Units and container files of a deployment: they start the very commands that are there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from fedgrove.cli.entry import app
from fedgrove.deploy.layout import Request, init
from fedgrove.deploy.services import FOLDER, PLACE, PROGRAM, Side, command, unit_text

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("services") / "d"
    init(Request(folder, "fl.example.org", 9000, ["north"], keys=False))
    return folder


@pytest.mark.parametrize("side", ["server", "site"])
def test_what_is_started_is_a_command_with_these_options(side: Side) -> None:
    deploy = get_command(app).commands["deploy"]  # type: ignore[attr-defined]
    name, folder, *options = command(side)
    chosen = deploy.commands[name]
    assert folder == "."
    known = {option for each in chosen.params for option in each.opts}
    assert set(options) <= known


def test_compose_files_are_of_one_side_each(sides: Path) -> None:
    server = yaml.safe_load((sides / "server" / FOLDER / "compose.yaml").read_text())
    site = yaml.safe_load((sides / "sites" / "north" / FOLDER / "compose.yaml").read_text())
    assert server["services"]["server"]["ports"] == ["9000:9000"]
    assert server["services"]["server"]["command"] == ["server", ".", "--resume"]
    assert "ports" not in site["services"]["site"], "a site only makes outgoing connections"
    assert site["services"]["site"]["stop_signal"] == "SIGINT"
    context = sides / "server" / FOLDER
    assert (context / server["services"]["server"]["build"]["dockerfile"]).exists()


@pytest.mark.parametrize(("side", "name"), [("server", "server"), ("site", "north")])
def test_systemd_reads_the_unit(side: Side, name: str, tmp_path: Path) -> None:
    """Only the paths that a machine must have are replaced."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not here")
    text = unit_text(side, name)
    assert f"{PLACE}/{name}" in text
    file = tmp_path / f"fedgrove-{side}.service"
    file.write_text(text.replace(PROGRAM, sys.executable))
    verified = subprocess.run(
        [analyze, "verify", "--man=no", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in verified.stderr.splitlines() if file.name in line]
    assert said == []
    file.write_text(text.replace("KillSignal=SIGINT", "KillSignal=SIGNOTHING"))
    wrong = subprocess.run(
        [analyze, "verify", "--man=no", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "SIGNOTHING" in wrong.stderr, "it would say what is wrong"
