"""Models: what clients left a run with, used and made anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedgrove.cli.shared import ClientName, RunDirectory, examples, printer
from fedgrove.ground.plain import Plain

commands = typer.Typer(rich_markup_mode="rich")


@commands.command(
    epilog=examples(
        "fedgrove export runs/fedit --client clinic-3 --out adapters/clinic-3",
        "fedgrove export runs/hilora --client clinic-3 --tier leaf --out adapters/clinic-3-leaf",
        "fedgrove export runs/flora --client clinic-3 --rank 16 --out adapters/clinic-3-small",
    )
)
def export(
    run: RunDirectory,
    client: ClientName,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where to write it, a new directory.", show_default=False),
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model, the adapter merged into it.")
    ] = False,
    tier: Annotated[
        str | None,
        typer.Option(
            metavar="TIER",
            help="One tier of it, where the method has tiers (hilora: root, cluster or leaf); they "
            "add up to it.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=1,
            help="The best approximation of this rank at every site; its error is told.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one client's model as a standard PEFT adapter (or a merged model) for use elsewhere."""
    from fedgrove.use.result import Result

    Result(run).client(client).export(out, merge=merge, tier=tier, rank=rank)
    if rank is not None:
        from fedgrove.interop import shrink

        print(shrink.read_loss(out).words())
    print(f"Wrote {out}.")


@commands.command(
    epilog=examples(
        "fedgrove adapt runs/hilora --data new-clinic.csv",
        "fedgrove adapt runs/hilora --data new-clinic.csv --name clinic-9 --epochs 10 --out "
        "adapters/clinic-9",
    )
)
def adapt(
    run: RunDirectory,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The new client's table (jsonl, csv, parquet), or its folder of images, a folder "
            "for each label.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its name; without it, the file's.", show_default=False),
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(
            metavar="E", min=0, help="Passes of local training; 0 places and measures it only."
        ),
    ] = 5,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="S",
            min=0,
            help="Of its split and its training; without it, the run's.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Its adapter's directory; without it, RUN/adapted/NAME.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Bring a client that never trained into a finished run: place it, measure it, train it, write
    its adapter.
    """
    from rich.table import Table

    from fedgrove.use.adapt import adapt as bring

    found = bring(run, data, name=name, epochs=epochs, seed=seed, out=out)
    console = printer()
    console.print(
        f"{found.name}: {found.train} training and {found.test} test examples, {found.method}"
    )
    if found.placed:
        console.print(f"It joins {found.placed}.")
    if found.head:
        console.print(f"Its head starts from {found.head}.")
    table = Table("", found.metric, "loss", box=None, pad_edge=False)
    for when, measures in found.measures.items():
        table.add_row(when, f"{measures[found.metric]:.3f}", f"{measures['loss']:.3f}")
    console.print(table)
    if found.privacy is not None:
        console.print(_private_words(found.privacy))
    print(f"Wrote {found.path}.")


def _private_words(spent: Mapping[str, Any]) -> str:
    """What training cost of a client's own example-level budget, as a sentence."""
    steps = f"{spent['steps']} private steps on its examples"
    if spent["epsilon"] is None:
        return f"{steps}, without noise: there is no epsilon."
    return f"{steps} cost epsilon = {spent['epsilon']:.3g} at delta = {spent['delta']:.2g}."


@commands.command(
    epilog=examples(
        "fedgrove evaluate runs/fedit",
        "fedgrove evaluate runs/fedit --client clinic-3 --data new.csv",
    )
)
def evaluate(
    run: RunDirectory,
    client: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One client; without it, every one.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A table (jsonl, csv, parquet) instead of the test data, or a folder of images, "
            "one for each label.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure the finished clients' models on their test data, or on a file."""
    from fedgrove.use.result import Result

    result = Result(run)
    for name in [client] if client else result.names():
        print(*_measured(name, result.client(name).measures(data)), sep="\n")


def _measured(name: str, measures: Plain) -> Iterator[str]:
    """A line of numbers, and one below for each metric that has a number by class."""
    plain = [f"{key} {_figure(value)}" for key, value in measures.items() if not _by_class(value)]
    yield "  ".join([name, *plain])
    for key, value in measures.items():
        if _by_class(value):
            yield "  ".join([f"    {key}", *(f"{each} {_figure(x)}" for each, x in value.items())])


def _by_class(value: Any) -> bool:
    return isinstance(value, Mapping)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@commands.command(
    epilog=examples('fedgrove predict runs/fedit --client tweets-0 "what a day" "not again"')
)
def predict(
    run: RunDirectory,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...", help="One or more texts, prompts or image files.", show_default=False
        ),
    ],
    client: ClientName,
) -> None:
    """Ask one client's model about texts or images: the likeliest label, or what it writes after a
    prompt.
    """
    from fedgrove.use.result import Result

    for text, answer in zip(texts, Result(run).client(client).predict(texts), strict=True):
        print(f"{answer}\t{text}")
