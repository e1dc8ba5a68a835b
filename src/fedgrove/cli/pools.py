"""Pools: made of finished adapters, signed for, asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgrove.cli.shared import examples, printer
from fedgrove.ground.errors import RunError

if TYPE_CHECKING:
    from fedgrove.pools import Pool
    from fedgrove.pools.against import Against
    from fedgrove.pools.signature import Kind
    from fedgrove.use.predictions import Prediction

commands = typer.Typer(rich_markup_mode="rich")

Signed = Annotated[
    str,
    typer.Option(
        "--signature",
        metavar="KIND",
        help="Sign the members of runs on their own training rows: mean, or gaussian (mean and "
        "covariance); none signs nobody.",
    ),
]
Noise = Annotated[
    float,
    typer.Option(
        "--noise",
        metavar="Z",
        min=0,
        help="Gaussian noise on a signature of the kind mean, as a multiple of what one example can "
        "change; the epsilon is told.",
    ),
]


@commands.command(
    epilog=examples(
        "fedgrove pool runs/clinics --out pools/clinics --router arrow",
        "fedgrove pool runs/clinics --out pools/clinics --router retrieve --signature mean",
        "fedgrove pool north/ south/ --out pools/two --router roc --samples north=n.csv --samples "
        "south=s.csv",
        'fedgrove predict pools/clinics "chest pain since the morning" --why',
        "fedgrove evaluate pools/clinics --against own,base,uniform,best --mask-own",
    )
)
def pool(
    members: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|DIR...",
            help="Runs (all clients that trained) and adapter directories of any PEFT user.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="POOL", help="Where to write, a new directory.", show_default=False),
    ],
    router: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Who chooses: retrieve (nearest signatures), arrow (weights alone), roc (a budget of "
            "components), attention (a query of each token) or uniform (all alike).",
        ),
    ] = "arrow",
    compose: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="How retrieve and uniform add up: mixture (outputs), fusion (factors) or ensemble "
            "(probabilities).",
            show_default="mixture",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Members to an input.",
            show_default="3, or all of fewer",
        ),
    ] = None,
    signature: Signed = "none",
    samples: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Sign one member on this table; repeats.",
            show_default=False,
        ),
    ] = None,
    noise: Noise = 0.0,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The one base of all, where members call it differently.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Train the router attention on this table, members left out by turns.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(metavar="E", min=1, help="Passes over the rows of --train.")
    ] = 3,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A key of the router, such as tau=0.05; repeats.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a pool of finished adapters: a router chooses, for each input, who answers. Members stay
    as they are.
    """
    from fedgrove.pools import pool as make
    from fedgrove.pools.attend import attended
    from fedgrove.pools.pictures import write_page
    from fedgrove.pools.pool import refuse_used, table_of

    refuse_used(out)
    made = make(
        members,
        router=router,
        compose=compose,
        top_k=top_k,
        options=option or [],
        signature=_kind(signature),
        samples=_samples(samples or []),
        noise=noise,
        base=base,
    )
    if train is not None:
        made = attended(made, table_of(train, None, made.kernel), epochs=epochs)
    made.save(out)
    write_page(made, out)
    signed = [each for each in made.members if each.signature is not None]
    print(f"{len(made.members)} members: {', '.join(made.names)}.")
    for each in signed:
        if each.signature is not None:
            print(f"{each.name} is signed by the {each.signature.words()}.")
    print(f"Wrote {out}.")


@commands.command(
    epilog=examples(
        "fedgrove sign runs/clinics/adapters/north --data north.csv",
        "fedgrove sign adapters/visitor --data own.csv --kind gaussian",
        "fedgrove sign adapters/visitor --data own.csv --noise 2",
    )
)
def sign(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Your adapter's directory.", show_default=False),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="A table of what it was trained on, or a folder of images.",
            show_default=False,
        ),
    ],
    kind: Annotated[str, typer.Option(metavar="KIND", help="mean or gaussian.")] = "mean",
    noise: Noise = 0.0,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Of the rows that are drawn.")] = 0,
) -> None:
    """Write down what your adapter's data look like, so that a pool can send it inputs of their kind:
    signature.safetensors beside it. It is made of your data; nothing else makes one.
    """
    from fedgrove.pools.members import members, places
    from fedgrove.pools.pool import kernel_of, sign_member, table_of
    from fedgrove.pools.signature import save

    wanted = _kind(kind)
    if wanted is None:
        raise RunError("--kind none signs nothing; give mean or gaussian.")
    found = members(places([adapter]))
    if len(found) != 1:
        raise RunError(f"{adapter} is a run; name one adapter, such as {adapter}/adapters/CLIENT.")
    kernel = kernel_of(found)
    rows = table_of(data, found[0].place, kernel)
    made = sign_member(found[0], kernel, rows, wanted, noise=noise, seed=seed)
    path = save(adapter, made)
    print(f"Signed by the {made.words()}.")
    print(f"Wrote {path}.")


@commands.command(
    epilog=examples(
        "fedgrove recycle pools/animals --out adapters/few-shot --shots my-animals",
        "fedgrove recycle pools/animals --out adapters/few-shot --public photos --each 32",
    )
)
def recycle(
    pool: Annotated[
        Path,
        typer.Argument(metavar="POOL", help="A pool of image classifiers.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where to write, a new directory.", show_default=False),
    ],
    shots: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A few images of new classes, a folder for each: the head is made of them.",
            show_default=False,
        ),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Public images, a folder for each label: what real ones look like inside the base.",
            show_default=False,
        ),
    ] = None,
    each: Annotated[
        int, typer.Option(metavar="N", min=2, help="Images made of each class of each member.")
    ] = 16,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps to make them in.")] = 2000,
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="Of meta-training.")] = 2000,
    ways: Annotated[int, typer.Option(metavar="W", min=2, help="Classes of an episode.")] = 5,
    few: Annotated[
        int,
        typer.Option(
            "--support",
            metavar="K",
            min=1,
            help="Images of a class shown first.",
        ),
    ] = 1,
    rank: Annotated[int, typer.Option(metavar="R", min=1, help="Of the adapter.")] = 4,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Of images and episodes.")] = 0,
) -> None:
    """One adapter for classes that nobody trained, out of the members alone: images are drawn from
    them, and on these it learns to tell classes by a few examples. The images are kept: they show
    what an adapter gives away.
    """
    from fedgrove.pools import open_pool
    from fedgrove.pools import recycled as leaving
    from fedgrove.pools.inversion import Effort, statistics
    from fedgrove.pools.pool import refuse_used
    from fedgrove.pools.recycle import MetaTraining
    from fedgrove.pools.recycle import recycle as make

    refuse_used(out)
    found = open_pool(pool)
    leaving.refuse_stock(found)
    real = None
    shown = []
    if shots is not None:
        shown = leaving.labelled(shots)
    if public is not None:
        paths = [path for path, _ in leaving.labelled(public)]
        real = statistics(found.kernel, leaving.images_of(found, paths))
    effort = Effort(each=each, steps=steps, seed=seed)
    course = MetaTraining(episodes=episodes, ways=ways, shots=few, rank=rank, seed=seed)
    made = make(found, effort, course, real)
    leaving.write(found, made, out, shown)
    for name, inverted in made.images.items():
        print(
            f"{name}: loss of its images {inverted.first:.3f} at first, {inverted.best:.3f} kept."
        )
    print(f"Wrote {out}; {out / leaving.IMAGES} shows what the adapters give away.")


# ------------------------------------------------------- what other commands do with a pool
def is_pool(folder: Path) -> bool:
    """Whether a directory holds a pool."""
    return (folder / "pool.json").is_file()


def refuse(
    folder: Path,
    base: str | None,
    labels: str | None = None,
    settings: Sequence[str] | None = None,
) -> None:
    """Raises ``RunError`` for what is said of one adapter, and a pool knows by itself."""
    for option, given in (("--base", base), ("--labels", labels), ("--set", settings)):
        if given:
            raise RunError(
                f"{folder} is a pool, which knows its base, labels and columns; leave out {option}."
            )


def answers(
    folder: Path,
    texts: Sequence[str],
    beside: Mapping[str, str],
    data: Path | None,
    client: str | None,
    *,
    why: bool,
) -> list[Prediction]:
    """What a pool, or one member of it, says of texts, with what stands ``beside`` them; ``why``: also
    noted, with the reasons.
    """
    from fedgrove.pools import open_pool
    from fedgrove.pools.against import note_routes
    from fedgrove.pools.pictures import write_page
    from fedgrove.pools.pool import table_of
    from fedgrove.use.predictions import predictions
    from fedgrove.use.questions import questions, with_beside

    if client is not None and why:
        raise RunError("--why tells who answers; leave out --client.")
    found = open_pool(folder)
    model = found.model
    if client is not None:
        model = found.member(client)
    if data is not None:
        rows = table_of(data, None, found.kernel)
    else:
        task = found.kernel.task
        rows = questions(task, with_beside(type(task), texts, beside))
    told = predictions(model, rows)
    if why:
        note_routes(folder, [each.asked for each in told], found.routes(rows))
        write_page(found, folder)
    return told


def explain(folder: Path, count: int) -> None:
    """Who answered the last ``count`` inputs."""
    from rich.table import Table

    from fedgrove.pools.against import noted
    from fedgrove.pools.pictures import reasons

    table = Table("asked", "answered by", "compared", box=None, pad_edge=False)
    for line in noted(folder, count):
        table.add_row(str(line["asked"]), *reasons(line))
    printer().print(table)


def evaluate_with(
    folder: Path,
    data: Path | None,
    against: str | None,
    mask_own: bool,
    metrics: Sequence[str],
) -> None:
    """``fedgrove evaluate`` of a pool."""
    from fedgrove.pools import against as comparing
    from fedgrove.pools import open_pool
    from fedgrove.pools.pictures import write_page
    from fedgrove.pools.pool import table_of

    rivals: list[str] = []
    if against:
        rivals = comparing.checked([name.strip() for name in against.split(",")])
    found = open_pool(folder)
    if data is not None:
        rows = {comparing.EVERYBODY: table_of(data, None, found.kernel)}
    else:
        rows = comparing.owners_rows(found)
    measured = comparing.against(found, rows, rivals, mask_own=mask_own)
    _show(found, measured, list(metrics))
    comparing.write(folder, measured)
    write_page(found, folder)
    print(f"Wrote {folder / comparing.FILE} and pool.html.")


def _show(
    found: Pool,
    measured: Against,
    metrics: Sequence[str],
) -> None:
    """A row for each owner, a column for the pool and each rival, and the means."""
    from rich.table import Table

    from fedgrove.use.matrix import figure

    first = next(iter(measured.measures["pool"].values()))
    for metric in metrics or [measured.metric]:
        if metric not in first or isinstance(first[metric], dict):
            known = [key for key, value in first.items() if not isinstance(value, dict)]
            raise RunError(
                f"--metrics: there is no measure {metric!r}; choose from {', '.join(known)}."
            )
        table = Table(
            f"{metric}: rows of",
            *measured.measures,
            box=None,
            pad_edge=False,
        )
        for owner in measured.measures["pool"]:
            cells = [figure(each[owner][metric]) for each in measured.measures.values()]
            table.add_row(owner, *cells)
        if metric == measured.metric and len(measured.measures["pool"]) > 1:
            means = [figure(measured.mean(who)) for who in measured.measures]
            table.add_row("mean", *means)
        printer().print(table)
    if measured.best is not None:
        print(f"The best single member, chosen on these rows, is {measured.best}.")


def export_with(
    folder: Path,
    out: Path,
    client: str | None,
    merge: bool,
) -> None:
    """``fedgrove export`` of a pool: a member, or the one adapter that computes it."""
    from fedgrove.pools import open_pool
    from fedgrove.pools.leave import export_member, export_whole

    found = open_pool(folder)
    if client is not None:
        export_member(found, client, out, merge=merge)
    else:
        export_whole(found, out, merge=merge)
    print(f"Wrote {out}.")


def _kind(name: str) -> Kind | None:
    if name == "mean":
        return "mean"
    if name == "gaussian":
        return "gaussian"
    if name == "none":
        return None
    raise RunError(f"{name!r} is no kind of signature; choose from none, mean and gaussian.")


def _samples(given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise RunError(f"--samples {text}: write NAME=FILE, a member and its table.")
        if name in found:
            raise RunError(f"--samples {name} is given twice; give it once.")
        found[name] = Path(path)
    return found
