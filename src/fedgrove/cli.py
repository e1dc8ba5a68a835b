"""The command line: parse, call, print. Everything heavy is imported inside the commands, so that
help is instant.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

import fedgrove
from fedgrove.deploy.cli import app as deploy
from fedgrove.ground.errors import FedgroveError

if TYPE_CHECKING:
    from rich.console import Console

    from fedgrove.federation import Federation
    from fedgrove.federation.readers import Row
    from fedgrove.job import Job

app = typer.Typer(
    name="fedgrove",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

app.add_typer(deploy)

JobFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[JOB.toml]", help="The job; without it, the embedded default.", show_default=False
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
ClientName = Annotated[
    str, typer.Option("--client", metavar="NAME", help="One client of the run.", show_default=False)
]


def _examples(*lines: str) -> str:
    return "\n\n".join(
        ["[bold]Examples[/bold]", *lines]
    )  # a paragraph each, or rich would join them


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedgrove {fedgrove.__version__}")
        raise typer.Exit


@app.callback(
    epilog=_examples(
        "fedgrove demo                          (a whole federation in a few minutes)",
        "fedgrove init job.toml                 (a commented job to start from)",
        "fedgrove data job.toml                 (who would hold what)",
        "fedgrove run job.toml --rounds 20      (run it)",
        'fedgrove predict runs/fedit --client tweets-0 "what a day"',
    )
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from.", show_default=False)
    ] = False,
) -> None:
    """Federated fine-tuning with LoRA: clients train on their own data, and each leaves with its
    own PEFT adapter.
    """


@app.command(
    epilog=_examples(
        "fedgrove run",
        "fedgrove run job.toml --method fedsa-lora --seed 1 --out runs/fedsa",
        "fedgrove run job.toml --set train.lr=5e-4 --set federation.ranks=[4,8]",
        "fedgrove run job.toml --out runs/fedsa --resume",
    )
)
def run(
    job: JobFile = None,
    settings: Settings = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="M", help="The method (`fedgrove methods`).", show_default=False),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="T", help="Rounds.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Seed.", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's directory, a new one.", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint; start where there is none."),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            metavar="E", help="local: in this process; flower: on Flower and Ray, in several."
        ),
    ] = "local",
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T",
            help="Also log curves with tensorboard or wandb; may be repeated.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Show where time and memory went, also in profile.json.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Run a federation. Ctrl-C stops it cleanly; --resume goes on, to the same numbers."""
    chosen = _job(job, settings, method=method, rounds=rounds, seed=seed, out=out)
    from fedgrove.start import run as start
    from fedgrove.tracking.live import progress
    from fedgrove.tracking.trackers import trackers
    from fedgrove.training.profile import profiling
    from fedgrove.training.profile import save as save_profile

    try:
        with profiling() if profile else nullcontext() as recorded:
            result = start(
                chosen, resume=resume, callbacks=[progress(), *trackers(track or [])], engine=engine
            )
    except KeyboardInterrupt:
        given = f" {job}" if job else ""
        if (chosen.directory() / "job.toml").exists():
            where = (
                f"--out {chosen.directory()}{'' if engine == 'local' else f' --engine {engine}'}"
            )
            _say(f"Go on with `fedgrove run{given} {where} --resume` and the same settings.", 130)
        raise
    if recorded is not None:
        print(save_profile(result.path / "profile.json", recorded))
    print(f"Adapters, one for each client: {result.path / 'adapters'}")
    print(f"Open the report: {result.report}")


@app.command(
    epilog=_examples(
        "fedgrove compare job.toml --methods fedit,hilora --seeds 0,1,2 --out compared",
        'fedgrove compare --methods "fedtreelora, fedtreelora\\[K=1]" --tune lr=3e-4,1e-3,3e-3 '
        "--out compared",
        'fedgrove compare --methods "fed-plora, by size: fed-plora\\[selection=magnitude]" --out '
        "compared",
    )
)
def compare(
    methods: Annotated[
        str,
        typer.Option(
            metavar="M,...",
            help="Methods, each with its own options in brackets and a label before a colon where "
            "you want one: "
            "fedit, two trees: fedtreelora\\[K=2].",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where everything goes.", show_default=False)
    ],
    job: JobFile = None,
    seeds: Annotated[
        str, typer.Option(metavar="S,...", help="Seeds; one run of each method for each.")
    ] = "0,1,2",
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V,...",
            help="Choose the best of these values for each method, on a validation split (20 % of "
            "each client's "
            "examples where the job has none); repeats, for all combinations.",
            show_default=False,
        ),
    ] = None,
    tune_seed: Annotated[
        int | None,
        typer.Option(
            metavar="S",
            help="Seed of the trials, not one of --seeds; without it, the largest of those + 1000.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the job for all methods; repeats.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare methods on the same clients, splits and budget: tables, tests and one page.

    Every method is shown as it is and after the same local fine-tuning. What is done already is not
    done again.
    """
    chosen = _job(job, None)
    from fedgrove.compare.comparison import compare as start
    from fedgrove.compare.tables import costs, results, terminal

    try:
        found = start(
            chosen,
            methods,
            seeds,
            out,
            tune=tune or [],
            settings=settings or [],
            tune_seed=tune_seed,
        )
    except KeyboardInterrupt:
        _say(f"What is done is in {out}; the same command goes on from there.", 130)
        raise
    console = _console()
    for grid in (results(found), costs(found)):
        for table in terminal(grid, console.width):
            console.print()
            console.print(table)
        console.print(" ".join(grid.caption))
    console.print()
    for note in found["notes"]:
        console.print(note)
    print(f"Wrote {out / 'compare.html'}, with compare.json, table.md and table.tex beside it.")


@app.command(epilog=_examples("fedgrove init", "fedgrove init jobs/clinics.toml"))
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


@app.command(
    epilog=_examples(
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
    chosen = _job(job, settings)
    print(chosen.explain() if explain else chosen.to_toml(), end="")


@app.command()
def methods() -> None:
    """List the methods: what each trains, shares and keeps private, and its paper."""
    from rich.table import Table

    from fedgrove.methods.registry import catalogue

    table = Table("method", "trains", "shares", "keeps private", "paper", box=None, pad_edge=False)
    for name, kind in catalogue().items():
        table.add_row(name, kind.trains, kind.shares, kind.keeps, kind.paper)
    _console().print(table)


@app.command(
    epilog=_examples(
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

    chosen = _job(job, settings)
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
    _console().print(table)
    print("", *shown.sentences, sep="\n")
    if long:
        cut, rows = (sum(own["cut"] for own in long.values()), sum(map(len, _rows(federation))))
        print(f"{cut} of {rows} rows are longer than data.max_length = {most} and will be cut.")
    elif tokens:
        print("This task's rows have no length in tokens: nothing is cut.")


@app.command(
    epilog=_examples(
        "fedgrove export runs/fedit --client clinic-3 --out adapters/clinic-3",
        "fedgrove export runs/hilora --client clinic-3 --tier leaf --out adapters/clinic-3-leaf",
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
) -> None:
    """Write one client's model as a standard PEFT adapter (or a merged model) for use elsewhere."""
    from fedgrove.use.result import Result

    Result(run).client(client).export(out, merge=merge, tier=tier)
    print(f"Wrote {out}.")


@app.command(
    epilog=_examples(
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
    console = _console()
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
    print(f"Wrote {found.path}.")


@app.command(
    epilog=_examples(
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
        measures = result.client(name).evaluate(data)
        print("  ".join([name, *(f"{key} {value:.4g}" for key, value in measures.items())]))


@app.command(
    epilog=_examples('fedgrove predict runs/fedit --client tweets-0 "what a day" "not again"')
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


@app.command(
    epilog=_examples(
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
            options=option or [],
            phase=phase,
        )
    for sentence in done.sentences():
        print(sentence)


@app.command(
    epilog=_examples(
        "fedgrove report runs/fedit", "fedgrove report runs/hilora --beside runs/local"
    )
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


@app.command(epilog=_examples("fedgrove demo", "fedgrove demo --out runs/first"))
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the demo's runs go.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Watch a real federation: 16 clients, a real encoder, real text, about five minutes on two
    cores.
    """
    from fedgrove.demo import demo as show

    show(out)


def console() -> int:
    """``main`` as a process of its own, which looks for garbage less often.

    What the libraries' imports make stays: going through it again and again is a tenth of the
    start, and once more at the end a second.
    """
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for what the user can mend, 1 for what we must, 130
    for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:  # welcome anywhere, though it belongs to the root command
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    try:
        code = typer.main.get_command(app).main(
            arguments, prog_name="fedgrove", standalone_mode=False
        )
        sys.stdout.flush()
        # typer turns Ctrl-C into this code without a word
        return _say("Interrupted.", code) if code == 130 else int(code or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _say("Interrupted.", 130)
    except BrokenPipeError:
        # The reader has left (`| head`); what Python would still flush at exit must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        sentence, code = explain(error)
        return _say(f"Error: {sentence}", code)


def explain(error: Exception) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    if isinstance(error, FedgroveError):
        return str(error), 2
    where = (
        f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
    )
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return (
            f"There is no space left on the disk{where}; free some, or choose another place with "
            f"--out.",
            2,
        )
    if getattr(error, "errno", None) == errno.EDQUOT:
        return (
            f"The disk quota is used up{where}; free some, or choose another place with --out.",
            2,
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be used: {error.strerror or error}.", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "The memory is used up; lower train.batch_size, train.eval_batch_size or "
            "data.max_length.",
            2,
        )
    words = " ".join(str(error).split())
    return (
        f"Unexpected {type(error).__name__}: {words or 'no details'} (--debug shows where it came "
        f"from).",
        1,
    )


def _job(
    path: Path | None,
    settings: list[str] | None,
    *,
    method: str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
) -> Job:
    from fedgrove.job import Job
    from fedgrove.job.toml import value_text

    named = {
        "method.name": method,
        "run.rounds": rounds,
        "run.seed": seed,
        "run.out": str(out) if out else None,
    }
    flags = [f"{key}={value_text(value)}" for key, value in named.items() if value is not None]
    return (Job.load(path) if path else Job.default()).override([*(settings or []), *flags])


def _rows(federation: Federation) -> Iterator[list[Row]]:
    for client in federation.clients:
        yield from (client.train, client.test, client.validation)


def _console() -> Console:
    """Wide where the output is no terminal, so that no table is folded on its way into a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code
