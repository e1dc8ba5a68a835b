"""What a finished run gives away of the rows that it was trained on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgrove.cli.shared import examples as shown
from fedgrove.cli.shared import printer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fedgrove.use.audit import Outcome

commands = typer.Typer(rich_markup_mode="rich")


@commands.command(
    epilog=shown(
        "fedgrove audit runs/fedit",
        "fedgrove audit runs/plain runs/with-dp --attacks update --examples 100",
        "fedgrove audit runs/fedit --clients 4 --seed 1",
    )
)
def audit(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Finished runs, such as one without and one with privacy.",
            show_default=False,
        ),
    ],
    attacks: Annotated[
        str,
        typer.Option(
            metavar="A,...",
            help="loss: whoever holds an adapter; gain: the same, beside the untouched base; update: "
            "whoever sees what a client sends.",
        ),
    ] = "loss,gain,update",
    examples: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="At most so many rows of each kind and client."),
    ] = 50,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="At most so many clients, drawn by --seed; without it, all.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows and clients that are drawn.")] = 0,
) -> None:
    """How well an attacker tells the rows that clients were trained on from rows that they never
    saw. A coin has 0.5; what is well above says that an adapter, or an update, gives members away.
    """
    from rich.progress import Progress
    from rich.table import Table

    from fedgrove.use.audit import FALSE_ALARMS, FILE
    from fedgrove.use.audit import audit as attack

    wanted = [name.strip() for name in attacks.split(",")]
    console = printer()
    table = Table(
        "run",
        "attack",
        "AUC",
        "95 % interval",
        f"found at {FALSE_ALARMS:.0%} false alarms",
        "clients",
        box=None,
        pad_edge=False,
    )
    for run in runs:
        with Progress(transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"Attacking {run}", total=None)
            outcomes = attack(
                run,
                wanted,
                examples=examples,
                clients=clients,
                seed=seed,
                advance=partial(_one_more, progress, bar),
            )
        for each in outcomes:
            table.add_row(str(run), *_row(each))
        if missing := [name for name in wanted if name not in {each.attack for each in outcomes}]:
            table.add_row(str(run), missing[0], "-", "nothing travels", "-", "0")
    console.print(table)
    print(f"Wrote {FILE} into {', '.join(map(str, runs))}.")


def _one_more(progress: Progress, bar: TaskID, client: str) -> None:
    progress.advance(bar)


def _row(each: Outcome) -> tuple[str, ...]:
    interval = "one client"
    if each.interval is not None:
        low, high = each.interval
        interval = f"{low:.3f} to {high:.3f}"
    return (
        each.attack,
        f"{each.auc:.3f}",
        interval,
        f"{each.found:.1%}",
        str(len(each.by_client)),
    )
