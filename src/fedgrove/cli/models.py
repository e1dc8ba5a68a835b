"""Models: what clients left a run with, used and made anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgrove.cli import pools
from fedgrove.cli.shared import (
    BaseModel,
    ClientName,
    Columns,
    Labels,
    ModelDirectory,
    RunDirectory,
    examples,
    labels_of,
    printer,
    say,
)
from fedgrove.ground.errors import RunError
from fedgrove.ground.plain import Plain

if TYPE_CHECKING:
    from fedgrove.use.adapt import Way
    from fedgrove.use.predictions import Prediction
    from fedgrove.use.result import Result

commands = typer.Typer(rich_markup_mode="rich")


@commands.command(
    epilog=examples(
        "fedgrove export runs/fedit --client clinic-3 --out adapters/clinic-3",
        "fedgrove export runs/hilora --client clinic-3 --tier leaf --out adapters/clinic-3-leaf",
        "fedgrove export runs/flora --client clinic-3 --rank 16 --out adapters/clinic-3-small",
        "fedgrove export runs/chat --client clinic-3 --to gguf --out clinic-3.gguf",
        "fedgrove export their-adapter --base models/bert --merge --out models/theirs",
        "fedgrove export pools/clinics --client clinic-3 --out adapters/clinic-3",
    )
)
def export(
    directory: ModelDirectory,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where to write it, a new directory (with --to gguf a file).",
            show_default=False,
        ),
    ],
    client: ClientName = None,
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
    to: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="peft: a directory that PEFT loads; gguf: a file for llama.cpp; vllm: as peft, with "
            "one rank and one scale for all sites.",
        ),
    ] = "peft",
    base: BaseModel = None,
) -> None:
    """Write one model as a standard PEFT adapter (or a merged model) for use elsewhere."""
    from fedgrove.use.chosen import chosen
    from fedgrove.use.exporting import export as write

    if pools.is_pool(directory):
        if tier is not None or rank is not None or to != "peft":
            raise RunError(
                f"{directory} is a pool; --tier, --rank and --to are for one model: export a member with "
                "--client, then that."
            )
        pools.refuse(directory, base)
        pools.export_with(directory, out, client, merge)
        return
    source = chosen(directory, client, base=base).path
    for sentence in write(source, out, base, merge=merge, tier=tier, rank=rank, to=to):
        print(sentence)
    print(f"Wrote {out}.")


@commands.command(
    epilog=examples(
        "fedgrove adapt runs/hilora --data new-clinic.csv",
        "fedgrove adapt runs/hilora --data new-clinic.csv --name clinic-9 --epochs 10 --out "
        "adapters/clinic-9",
        "fedgrove adapt runs/hilora --data few-shots.csv --how prototypes",
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
            metavar="E",
            min=0,
            help="Passes of local training; 0 places and measures it only.",
        ),
    ] = 5,
    how: Annotated[
        str,
        typer.Option(
            metavar="WAY",
            help="train; or without a step: route (the run's adapters, weighed by a router), prototypes "
            "(a head of class means).",
        ),
    ] = "train",
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

    found = bring(
        run,
        data,
        name=name,
        epochs=epochs,
        seed=seed,
        out=out,
        way=_way(how),
    )
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


def _way(how: str) -> Way | None:
    """How a newcomer's model is made; None: by training it."""
    if how == "train":
        return None
    if how == "prototypes":
        from fedgrove.use.prototypes import by_prototypes

        return by_prototypes
    if how == "route":
        from fedgrove.pools.newcomer import by_routing

        return by_routing
    raise RunError(f"--how {how}: choose from train, route and prototypes.")


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
        "fedgrove evaluate runs/fedit --client _global",
        "fedgrove evaluate runs/fedit --on all --metrics f1_macro,ece",
        "fedgrove evaluate their-adapter --data new.csv --labels negative,positive",
        "fedgrove evaluate pools/clinics --against own,base,uniform,best --mask-own",
    )
)
def evaluate(
    directory: ModelDirectory,
    client: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One client, or _global, the common model; without it, every one.",
            show_default=False,
        ),
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
    on: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="own: each model on its client's test data; all: every model on every client's, a "
            "table here, matrix.json and matrix.csv in the run.",
        ),
    ] = "own",
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="M,...",
            help="Which measures to show, such as f1_macro, mcc, balanced_accuracy, auroc, ece; "
            "without it, all, and of --on all the task's own.",
            show_default=False,
        ),
    ] = None,
    base: BaseModel = None,
    labels: Labels = None,
    settings: Columns = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="WHO,...",
            help="Of a pool: what else to measure on the same rows: own, base, uniform, best.",
            show_default=False,
        ),
    ] = None,
    mask_own: Annotated[
        bool,
        typer.Option(
            "--mask-own",
            help="Of a pool: also without the member of the client that tests.",
        ),
    ] = False,
) -> None:
    """Measure the finished clients' models on their test data, on everybody's, or on a file; or one
    adapter on a file.
    """
    from fedgrove.use.chosen import chosen, is_bare
    from fedgrove.use.result import Result

    if metrics:
        wanted = [name.strip() for name in metrics.split(",")]
    else:
        wanted = []
    if pools.is_pool(directory):
        if client is not None or on != "own":
            raise RunError(
                f"{directory} is a pool, which is measured whole; leave out --client and --on, and name "
                "what it has to beat with --against."
            )
        pools.refuse(directory, base, labels, settings)
        pools.evaluate_with(directory, data, against, mask_own, wanted)
        return
    if against is not None or mask_own:
        raise RunError(f"--against and --mask-own are for a pool; {directory} is none.")
    given: Plain = {"base": base, "labels": labels_of(labels), "settings": settings or ()}
    if is_bare(directory):
        if on != "own":
            raise RunError(f"--on {on} is for a run; {directory} is one adapter.")
        one = chosen(directory, client, **given)
        print(*_measured(one.name, _wanted(one.measures(data), wanted)), sep="\n")
        return
    result = Result(directory)
    if on not in ("own", "all"):
        raise RunError(f"--on {on}: give own or all.")
    if on == "all":
        if client or data:
            raise RunError(
                "--on all takes every model and all test data; leave out --client, --data."
            )
        _everybody(result, wanted)
        return
    for name in [client] if client else result.answering():
        found = chosen(directory, name, **given).measures(data)
        print(*_measured(name, _wanted(found, wanted)), sep="\n")


def _wanted(found: Plain, wanted: list[str]) -> Plain:
    """The measures that were asked for, or all."""
    if unknown := [each for each in wanted if each not in found]:
        known = ", ".join(found)
        raise RunError(f"--metrics: there is no measure {unknown[0]!r}; choose from {known}.")
    return {key: found[key] for key in wanted or found}


def _everybody(result: Result, wanted: list[str]) -> None:
    """The matrix of models and data: a table of each measure, and two files."""
    from rich.progress import Progress
    from rich.table import Table

    from fedgrove.federation.tasks import task_class
    from fedgrove.use.matrix import grid, matrix, write

    console = printer()
    with Progress(transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Measuring", total=len(result.answering()))
        found = matrix(result, lambda _: progress.advance(bar))
    files = write(result.path, found)
    for metric in wanted or [task_class(result.job.data).metric]:
        table = Table(f"{metric}: model", *result.tests, box=None, pad_edge=False)
        for line in grid(found, metric):
            table.add_row(*line)
        console.print(table)
    print(f"Wrote {files[0]} and {files[1]}.")


def _measured(name: str, measures: Plain) -> Iterator[str]:
    """A line of numbers, and one below for each metric that has a number by class."""
    from fedgrove.use.matrix import figure

    plain = [f"{key} {figure(value)}" for key, value in measures.items() if not _by_class(value)]
    yield "  ".join([name, *plain])
    for key, value in measures.items():
        if _by_class(value):
            yield "  ".join([f"    {key}", *(f"{each} {figure(x)}" for each, x in value.items())])


def _by_class(value: Any) -> bool:
    return isinstance(value, Mapping)


@commands.command(
    epilog=examples(
        'fedgrove predict runs/fedit --client tweets-0 "what a day" "not again"',
        "fedgrove predict runs/fedit --client tweets-0 --data new.csv --out answers.csv",
        'fedgrove predict their-adapter --base models/bert --labels no,yes --probs "not again"',
        'fedgrove predict runs/spans-small --client north-0 "Which drug on Monday?" --context "Monday: '
        'On Nubrex 20 mg."',
        'fedgrove predict pools/tweets "what a day" --why',
        'fedgrove predict runs/prefer --client north-0 "What helps?" --between "Tea." --between "Rest."',
    )
)
def predict(
    directory: ModelDirectory,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT...]",
            help="One or more texts, prompts or image files.",
            show_default=False,
        ),
    ] = None,
    client: ClientName = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A table with the job's columns instead of texts (it needs no labels), or a "
            "folder of images.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the answers, with the probabilities of all classes, as .csv or .jsonl.",
            show_default=False,
        ),
    ] = None,
    probs: Annotated[
        bool,
        typer.Option("--probs", help="Print the probability of every class, not the likeliest's."),
    ] = False,
    base: BaseModel = None,
    labels: Labels = None,
    settings: Columns = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Of data.task spans: the text that answers the questions.",
            show_default=False,
        ),
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="Of a pool: also who answered, and what decided it.")
    ] = False,
    between: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ANSWER",
            help="Of a model of preferences or rewards, twice: which of the two answers to each "
            "prompt is better.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Ask one model about texts, images or a table: the likeliest label and its score, what it
    writes after a prompt, where a text answers a question, or which of two answers is better.
    """
    from fedgrove.federation.tasks import task_class
    from fedgrove.use.chosen import chosen
    from fedgrove.use.predictions import check_out, check_probs, predictions, questions_of
    from fedgrove.use.questions import questions, with_beside

    if bool(texts) == bool(data):
        raise RunError("Give texts to ask about, or a table with --data, one of the two.")
    beside = _beside(context, between, data)
    if out is not None:
        check_out(out)
    if pools.is_pool(directory):
        pools.refuse(directory, base, labels, settings)
        found = pools.answers(directory, texts or [], beside, data, client, why=why)
        _told(found, out, probs=probs, scored=bool(data))
        if why:
            pools.explain(directory, len(found))
        return
    if why:
        raise RunError(f"--why is for a pool; {directory} is none.")
    one = chosen(
        directory,
        client,
        base=base,
        labels=labels_of(labels),
        settings=settings or (),
    )
    job = one.job
    task = task_class(job.data)
    if probs:
        check_probs(task)
    asked = with_beside(task, texts or (), beside)
    for text in texts or ():
        if task.asks != "image" and _is_file(text):
            say(
                f"{text} is a file, and its name is asked about; for its rows, use --data {text}.",
                0,
            )
    if data:
        rows = questions_of(data, job)
    else:
        rows = None
    model = one.model()
    if rows is None:
        rows = questions(model.kernel.task, asked)
    _told(predictions(model, rows), out, probs=probs, scored=bool(data))


def _beside(
    context: str | None,
    between: Sequence[str] | None,
    data: Path | None,
) -> dict[str, str]:
    """What is put beside each text, by the names of a row's parts."""
    found: dict[str, str] = {}
    if context is not None:
        found["context"] = context
    if between:
        if len(between) != 2:
            raise RunError("--between is given twice, once for each of two answers to a prompt.")
        found["chosen"], found["rejected"] = between
    if found and data:
        raise RunError("--context and --between go with texts; a table has them in its columns.")
    return found


def _told(
    found: Sequence[Prediction],
    out: Path | None,
    *,
    probs: bool,
    scored: bool,
) -> None:
    """Answers into a file, or a line each."""
    from fedgrove.use.predictions import write

    if out is not None:
        write(out, found)
        print(f"Wrote {out}, {len(found)} rows.")
        return
    for each in found:
        print(*_answer(each, probs=probs, scored=scored), sep="\t")


def _answer(
    found: Prediction,
    *,
    probs: bool,
    scored: bool,
) -> Iterator[str]:
    """The columns of a printed answer."""
    yield found.predicted
    if probs:
        yield from (f"{label} {value:.3f}" for label, value in found.scores.items())
    elif scored and found.scores:
        yield f"{found.scores[found.predicted]:.3f}"
    yield found.asked


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a long text is no name of a file
        return False
