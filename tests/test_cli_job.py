"""The command line around the job: what it passes on, what it says, how it exits. No command here
loads a model.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import fedgrove
from fedgrove.cli import explain, main
from fedgrove.cli.entry import program
from fedgrove.ground.errors import RunError
from fedgrove.job import Job

pytestmark = pytest.mark.usefixtures("few_methods")


class Started:
    """Stands in for the round loop: keeps what it was called with, raises what it is told to."""

    def __init__(self) -> None:
        self.job = Job.default()
        self.kept: dict[str, Any] = {}
        self.raises: BaseException | None = None

    def run(self, job: Job, **kept: Any) -> SimpleNamespace:
        if self.raises:
            raise self.raises
        self.job, self.kept = job, kept
        return SimpleNamespace(path=job.directory(), report=job.directory() / "report.html")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    stand_in = Started()
    loop, live = ModuleType("fedgrove.start"), ModuleType("fedgrove.tracking.live")
    loop.run = stand_in.run  # type: ignore[attr-defined]
    live.progress = lambda: "progress"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedgrove.start", loop)
    monkeypatch.setitem(sys.modules, "fedgrove.tracking.live", live)
    return stand_in


def child(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    code = "import sys; from fedgrove.cli import main; sys.exit(main())"
    environment = (
        os.environ
        | {"PYTHONPATH": str(Path(fedgrove.__file__).parents[1])}
        | options.pop("env", {})
    )
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment,
    } | options
    found: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-c", code, *arguments], **options
    )
    return found


# ------------------------------------------------------------ run


def test_run_without_a_job_runs_the_default(started: Started) -> None:
    assert main(["run"]) == 0
    assert started.job == Job.default()
    assert started.kept == {"engine": "local", "resume": False, "callbacks": ["progress"]}


def test_run_takes_a_job_and_its_changes(started: Started, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[run]\nrounds = 3\nseed = 1\n[train]\nlr = 0.5\n")
    changes = [
        "--set",
        "method.K=5",
        "--set",
        "train.optimizer=sgd",
        "--method",
        "fedtreelora",
        "--rounds",
        "20",
    ]
    assert main(["run", str(path), *changes, "--out", str(tmp_path / "a b"), "--resume"]) == 0
    job = started.job
    assert (job.method.name, job.method.options.K) == ("fedtreelora", 5)
    assert (job.run.rounds, job.run.seed, job.directory()) == (20, 1, tmp_path / "a b")
    assert (job.train.lr, job.train.optimizer) == (0.5, "sgd")
    assert started.kept["resume"] is True


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["run", "none.toml"],
            "Error: There is no job file none.toml; `fedgrove init none.toml` writes one to start "
            "from.",
        ),
        (
            ["run", "--set", "lora.rank=0"],
            "Error: lora.rank must be an integer of at least 1, not 0.",
        ),
        (["run", "--rounds", "0"], "Error: run.rounds must be an integer of at least 1, not 0."),
        (["run", "--seed", "-1"], "Error: run.seed must be an integer of at least 0, not -1."),
        (
            ["run", "--method", "fedtre"],
            'Error: method.name = "fedtre" is no method; did you mean "fedtreelora"?',
        ),
        (
            ["run", "--set", "train.lrr=1"],
            "Error: the key train.lrr is unknown; did you mean train.lr?",
        ),
        (["run", "--set", "nonsense"], "Error: 'nonsense' is no setting; write section.key=value"),
        (
            ["job", "broken.toml"],
            "Error: broken.toml, line 1, column 9: broken TOML (invalid value; text needs quotes)",
        ),
        (
            ["run", "--rounds", "many"],
            "Invalid value for '--rounds': 'many' is not a valid integer.",
        ),
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
        (["run", "--bogus"], "No such option"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(
    arguments: list[str],
    sentence: str,
    started: Started,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("model = minilm\n")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err
    if err.startswith("Error:"):
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            RunError("runs/x holds another job; choose another --out."),
            2,
            "Error: runs/x holds another job; choose an",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/y"),
            2,
            "no space left on the disk while writing runs/x/y;",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            2,
            "There is no space left on the disk; free",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/x"),
            2,
            "Error: runs/x cannot be used: Permission denied.",
        ),
        (MemoryError(), 2, "The memory is used up; lower train.batch_size"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "Error: Unexpected ZeroDivisionError: division by zero (--debug shows",
        ),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_errors_of_a_run(
    error: BaseException,
    code: int,
    sentence: str,
    started: Started,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started.raises = error
    assert main(["run"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--debug", "run"], ["run", "--debug"]])
def test_debug_shows_where_it_came_from(arguments: list[str], started: Started) -> None:
    started.raises = RunError("because")
    with pytest.raises(RunError, match="because"):
        main(arguments)


def test_out_of_memory_of_a_device_is_known_by_its_name() -> None:
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    assert explain(kind("CUDA out of memory. Tried to allocate 20 GiB"))[1] == 2


# ------------------------------------------------------------ init, job


def test_init_writes_the_default_job_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "jobs" / "mine.toml"
    assert main(["init", str(path)]) == 0
    assert Job.load(path) == Job.default()
    assert f"fedgrove run {path}" in capsys.readouterr().out
    path.write_text("# mine\n")
    assert main(["init", str(path)]) == 2
    assert f"{path} exists already" in capsys.readouterr().err
    assert path.read_text() == "# mine\n"


def test_job_prints_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[run]\nrounds = 3\n")
    assert main(["job", str(path), "--set", "train.lr=0.5"]) == 0
    assert Job.parse(capsys.readouterr().out) == Job.load(path).override(["train.lr=0.5"])


def test_job_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", "--explain", "--set", "method.name=fedtreelora"]) == 0
    text = capsys.readouterr().out
    assert text == Job.default().override(["method.name=fedtreelora"]).explain()
    assert "method.K: an integer of at least 1; default: 3" in text


# ------------------------------------------------------------ data, methods


def test_data_shows_who_holds_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silos = tmp_path / "silos"
    silos.mkdir()
    for name, good in (("north", 12), ("south", 4)):
        lines = [f"a fine day number {i},good" for i in range(good)] + [
            f"a bad day number {i},bad" for i in range(12)
        ]
        (silos / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    assert main(["data", "--set", "data.source=silos", "--set", f"data.path={silos}"]) == 0
    shown, said = capsys.readouterr().out.split("\n\n")
    heading, *rows = [line.split() for line in shown.splitlines()]
    assert heading == ["client", "train", "test", "bad", "good", "median", "words"]
    assert [(row[0], int(row[1]) + int(row[2])) for row in rows] == [("north", 24), ("south", 16)]
    assert said.splitlines()[0] == "2 clients, 30 training, 10 test rows, 2 labels."
    assert said.splitlines()[1].startswith("Data: silos, the folder ")
    assert [int(row[3]) + int(row[4]) for row in rows] == [
        int(row[1]) for row in rows
    ]  # labels in train


def test_methods_lists_what_travels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "trains", "shares", "keeps", "private", "paper"]
    (fedit,) = [line for line in lines if line.startswith("fedit ")]
    assert "2305.05644" in fedit
    (local,) = [line for line in lines if line.startswith("local ")]
    assert local.split()[:4] == ["local", "A,", "B", "nothing"]


# ------------------------------------------------------------ help


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "run",
        "init",
        "job",
        "methods",
        "data",
        "export",
        "evaluate",
        "predict",
        "report",
        "demo",
        "Examples",
    ):
        assert word in text
    for command in (
        "run",
        "init",
        "job",
        "data",
        "export",
        "evaluate",
        "predict",
        "report",
        "demo",
    ):
        assert main([command, "--help"]) == 0
        assert f"fedgrove {command}" in capsys.readouterr().out.split("Examples")[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedgrove {fedgrove.__version__}\n"


def test_the_table_of_commands_has_no_breaks_of_the_source() -> None:
    todo = list(program().commands.values())
    for command in todo:
        assert command.short_help
        assert "\n" not in command.short_help
        todo.extend(getattr(command, "commands", {}).values())
    assert len(todo) > 20


def test_help_in_a_process_of_its_own_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = child("run", "--help")
        seconds.append(time.perf_counter() - start)
        assert found.returncode == 0
        assert "--resume" in found.stdout
    assert (
        min(seconds) < 2
    )  # 0.15 s on an idle machine; torch alone would take longer than this bound


def test_errors_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = child("job", "none.toml", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr
        == "Error: There is no job file none.toml; `fedgrove init none.toml` writes one to start "
        "from.\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_sees_no_traceback(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        found = child("--version", stdout=closed, env={"PYTHONUNBUFFERED": unbuffered})
    assert (found.returncode, found.stderr) == (1, "")


# ------------------------------------------------------------ the package


def test_the_function_run_is_not_replaced_by_its_module() -> None:
    # In a process of its own: the modules must not have been imported yet.
    code = (
        "import sys, types, fedgrove\n"
        "assert 'fedgrove.job' not in sys.modules\n"
        # what the import system does after `import fedgrove.start`
        "fedgrove.start = types.ModuleType('fedgrove.start')\n"
        "assert 'run' not in vars(fedgrove)\n"
        "assert fedgrove.Job is __import__('fedgrove.job', fromlist=['Job']).Job\n"
        "assert dir(fedgrove) == sorted(fedgrove.__all__)\n"
        "try: fedgrove.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
