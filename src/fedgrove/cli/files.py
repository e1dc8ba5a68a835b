"""Files of others and of runs: one server round over adapter directories, a report anew, a live page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgrove.cli.shared import RunDirectory, examples

commands = typer.Typer(rich_markup_mode="rich")


@commands.command(
    epilog=examples(
        "fedgrove aggregate fedit site-a site-b site-c --weights 120,80,200 --out round-1",
        "fedgrove aggregate flexlora site-* --rank 16 --out round-1",
        "fedgrove aggregate fedtreelora site-* --option K=4 --option tau=0.05 --out round-1",
        "fedgrove aggregate fedrot-lora site-* --previous round-1 --out round-2",
    )
)
def aggregate(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="The method's rule.", show_default=False)
    ],
    clients: Annotated[
        list[Path],
        typer.Argument(
            metavar="CLIENT_DIR...",
            help="PEFT adapter directories, named as the clients.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where to write, a new directory.", show_default=False),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="One per client, in order; without it, all the same.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            help="Global rank of flexlora, raflora, hilora; without it, the largest.",
            show_default=False,
        ),
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The last round's output, for rules that refer to it.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the results call the base model, where the clients call it differently.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A key of the method, such as K=3; repeats.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Aggregate PEFT adapters that anyone trained with any tool: one server round, without the base
    model.
    """
    from fedgrove.aggregate import aggregate as combine
    from fedgrove.aggregate.progress import shown

    with shown() as phase:
        done = combine(
            method,
            clients,
            out,
            weights=weights,
            rank=rank,
            previous=previous,
            base=base,
            options=option or [],
            phase=phase,
        )
    for sentence in done.sentences():
        print(sentence)


@commands.command(
    epilog=examples("fedgrove report runs/fedit", "fedgrove report runs/hilora --beside runs/local")
)
def report(
    run: RunDirectory,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another finished run on the same clients, shown beside this one; may be repeated."
        ),
    ] = None,
) -> None:
    """Write a run's report anew: one self-contained HTML file."""
    from fedgrove.report import write_report

    print(f"Wrote {write_report(run, beside or [])}.")


@commands.command(epilog=examples("fedgrove watch runs/fedit", "fedgrove watch runs/fedit --open"))
def watch(
    run: RunDirectory,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0: any free one.")
    ] = 8750,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="The address of this machine that it listens on.")
    ] = "127.0.0.1",
    show: Annotated[
        bool, typer.Option("--open", help="Open it in the browser.", show_default=False)
    ] = False,
) -> None:
    """Serve a live page of a run that goes on, or is finished, from its directory alone, until
    Ctrl-C.
    """
    from fedgrove.ground.ctrlc import remembered
    from fedgrove.watch.server import Server, served

    server = Server(served(run), host, port)
    try:
        with remembered():
            print(f"Watch {run} at {server.address} (Ctrl-C ends it).", flush=True)
            if host not in ("127.0.0.1", "::1", "localhost"):
                print("It is not encrypted: whoever sees the traffic sees the token and the page.")
            if show:
                import webbrowser

                webbrowser.open(server.address)
            server.serve_forever()
    except KeyboardInterrupt:
        print("The page is closed; the run was not touched.")
    finally:
        server.server_close()
