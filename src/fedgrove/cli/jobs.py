"""Jobs: write one, check one, and see what there is to choose from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgrove.cli.shared import JobFile, Settings, examples, job_of, printer

if TYPE_CHECKING:
    from fedgrove.federation import Federation
    from fedgrove.federation.readers import Row


commands = typer.Typer(rich_markup_mode="rich")


@commands.command(epilog=examples("fedgrove init", "fedgrove init jobs/clinics.toml"))
def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="Where to write it.")] = Path(
        "job.toml"
    ),
) -> None:
    """Write a commented job to start from."""
    from fedgrove.ground.errors import JobError
    from fedgrove.job import Job

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(Job.template())
    except FileExistsError:
        raise JobError(f"{path} exists already; name another file, or remove it first.") from None
    print(
        f"Wrote {path}. Change it, look at it with `fedgrove data {path}`, then run it with "
        f"`fedgrove run {path}`."
    )


@commands.command(
    epilog=examples(
        "fedgrove job --explain",
        "fedgrove job job.toml",
        "fedgrove job job.toml --set method=hilora --explain",
    )
)
def job(
    job: JobFile = None,
    settings: Settings = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Describe every key: its type, default and meaning.")
    ] = False,
) -> None:
    """Check a job and print it with every key written out."""
    chosen = job_of(job, settings)
    print(chosen.explain() if explain else chosen.to_toml(), end="")


@commands.command()
def methods() -> None:
    """List the methods: what each trains, shares and keeps private, and its paper."""
    from rich.table import Table

    from fedgrove.methods.registry import catalogue

    table = Table(
        "method",
        "trains",
        "shares",
        "keeps private",
        "paper",
        box=None,
        pad_edge=False,
    )
    for name, kind in catalogue().items():
        table.add_row(name, kind.trains, kind.shares, kind.keeps, kind.paper)
    printer().print(table)


@commands.command(
    epilog=examples(
        "fedgrove data",
        "fedgrove data job.toml --set data.partition.options.alpha=0.1",
        "fedgrove data job.toml --tokens",
    )
)
def data(
    job: JobFile = None,
    settings: Settings = None,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Also how long the rows are in the model's tokens, and how many will be cut.",
        ),
    ] = False,
) -> None:
    """Show the clients of a job and who holds what, without training."""
    from rich.table import Table

    chosen = job_of(job, settings)
    from fedgrove.federation import build

    federation, long = build(chosen), {}
    if tokens:
        from fedgrove.interop.lengths import lengths

        long = lengths(chosen, federation)
    from fedgrove.federation.overview import LEFT, overview
    from fedgrove.federation.tasks import task_of

    most = task_of(chosen.data).tokens.get("max_length", 0)
    shown = overview(federation, long, most)
    table = Table(box=None, pad_edge=False)
    for heading in shown.headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    for row in shown.rows:
        table.add_row(*row)
    printer().print(table)
    print("", *shown.sentences, sep="\n")
    if long:
        cut, rows = (sum(own["cut"] for own in long.values()), sum(map(len, _rows(federation))))
        print(f"{cut} of {rows} rows are longer than data.max_length = {most} and will be cut.")
    elif tokens:
        print("This task's rows have no length in tokens: nothing is cut.")


def _rows(federation: Federation) -> Iterator[list[Row]]:
    for client in federation.clients:
        yield from (client.train, client.test, client.validation)
