"""``fedgrove vertical …``: data split by columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgrove.cli.shared import Settings, examples, printer, say

app = typer.Typer(
    name="vertical",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Parties that each hold other columns of the same entities, the labels at one of them "
    "(docs/vertical.md).",
)


@app.command(
    epilog=examples(
        "fedgrove vertical run job.toml",
        "fedgrove vertical run job.toml --seed 1 --out runs/joined-1",
        "fedgrove vertical run job.toml --set method.name=split --out runs/split",
        "fedgrove vertical run job.toml --resume",
    )
)
def run(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job.", show_default=False)],
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Seed.", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's directory, a new one.", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on after the last whole epoch; start where there is none."
        ),
    ] = False,
    engine: Annotated[
        str, typer.Option(metavar="E", help="local: every party simulated in this process.")
    ] = "local",
) -> None:
    """Train all parties together, and each alone, and say what joining is worth. Ctrl-C stops it
    cleanly; --resume goes on, to the same numbers.
    """
    from fedgrove.aggregate.progress import shown
    from fedgrove.job.toml import value_text
    from fedgrove.vertical import VerticalJob
    from fedgrove.vertical import run as start

    changes = list(settings or [])
    if seed is not None:
        changes.append(f"run.seed={seed}")
    if out is not None:
        changes.append(f"run.out={value_text(str(out))}")
    chosen = VerticalJob.load(job, changes)
    try:
        with shown() as phase:
            done = start(chosen, resume=resume, engine=engine, phase=phase)
    except KeyboardInterrupt:
        if (chosen.directory() / "job.toml").exists():
            say(
                f"Go on with `fedgrove vertical run {job} --out {chosen.directory()} --resume` and the "
                f"same settings.",
                130,
            )
        raise
    _tell(done.summary)
    print(f"Wrote {done.path / 'report.html'}.")


@app.command()
def keys() -> None:
    """Describe every key of a vertical job: its type, default and meaning."""
    from fedgrove.vertical.job import explain

    print(explain(), end="")


def _tell(summary: dict[str, object]) -> None:
    """Each party alone, and all together."""
    from rich.table import Table

    from fedgrove.vertical.report import grid

    first, *rows = grid(summary)
    table = Table(*first, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    printer().print(table)
