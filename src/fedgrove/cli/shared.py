"""What all commands share: arguments that several have, and how they speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedgrove.job import Job

JobFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[JOB.toml]",
        help="The job; without it, the embedded default.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key, for example train.lr=1e-3 or method.weights=uniform; repeats. VALUE is "
        "TOML, a bare "
        "word is a string, and an empty one returns the key to its default.",
        show_default=False,
    ),
]
RunDirectory = Annotated[
    Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)
]
ModelDirectory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A run, or one adapter directory: of a run, of export or aggregate, or of PEFT.",
        show_default=False,
    ),
]
ClientName = Annotated[
    str | None,
    typer.Option(
        "--client",
        metavar="NAME",
        help="One client of the run, or _global, the common model; of a pool one member.",
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="The base model (a folder, or a name), where the adapter's own is not found.",
        show_default=False,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="L,...",
        help="The classes in the order of the head's outputs, where the adapter does not name "
        "them.",
        show_default=False,
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of [data] for the columns of FILE, for example data.text=review; repeats.",
        show_default=False,
    ),
]


def examples(*lines: str) -> str:
    """An epilogue: a paragraph each, or rich would join them."""
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def labels_of(text: str | None) -> list[str] | None:
    """The names of a list with commas; None where none was given."""
    if text is None:
        return None
    return [name.strip() for name in text.split(",")]


def job_of(
    path: Path | None,
    settings: list[str] | None,
    *,
    method: str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
) -> Job:
    """The job of a file, or the default, with settings and flags, the flags winning."""
    from fedgrove.job import Job
    from fedgrove.job.toml import value_text

    if path:
        job = Job.load(path)
    else:
        job = Job.default()
    named = {"method.name": method, "run.rounds": rounds, "run.seed": seed}
    flags = [f"{key}={value_text(value)}" for key, value in named.items() if value is not None]
    if out:
        flags.append(f"run.out={value_text(str(out))}")
    return job.override([*(settings or []), *flags])


def printer() -> Console:
    """Wide where the output is no terminal, so that no table is folded on its way into a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


def say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code
