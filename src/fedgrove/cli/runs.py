"""Runs: one, several to compare, and the one to watch first."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fedgrove.cli.shared import JobFile, Settings, examples, job_of, printer, say

commands = typer.Typer(rich_markup_mode="rich")


@commands.command(
    epilog=examples(
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
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint, of a finished run with more --rounds too; start "
            "where there is none.",
        ),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            metavar="E",
            help="local: in this process; flower: on Flower and Ray, in several.",
        ),
    ] = "local",
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T",
            help="Also log curves with tensorboard, wandb or mlflow; may be repeated.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            help="Serve a live page meanwhile, to this machine alone (0: any free port).",
            min=0,
            max=65535,
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
    chosen = job_of(job, settings, method=method, rounds=rounds, seed=seed, out=out)
    from fedgrove.start import run as start
    from fedgrove.tracking.live import progress
    from fedgrove.tracking.trackers import trackers
    from fedgrove.training.profile import profiling
    from fedgrove.training.profile import save as save_profile
    from fedgrove.watch.beside import told

    try:
        with told(chosen.directory(), page), profiling() if profile else nullcontext() as recorded:
            result = start(
                chosen,
                resume=resume,
                callbacks=[progress(), *trackers(track or [])],
                engine=engine,
            )
    except KeyboardInterrupt:
        if job:
            given = f" {job}"
        else:
            given = ""
        if (chosen.directory() / "job.toml").exists():
            where = (
                f"--out {chosen.directory()}{'' if engine == 'local' else f' --engine {engine}'}"
            )
            say(f"Go on with `fedgrove run{given} {where} --resume` and the same settings.", 130)
        raise
    if recorded is not None:
        print(save_profile(result.path / "profile.json", recorded))
    print(f"Adapters, one for each client: {result.path / 'adapters'}")
    print(f"Open the report: {result.report}")


@commands.command(
    epilog=examples(
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
            "fedit, two trees: fedtreelora\\[K=2]. pooled: all rows on one machine, as a ceiling.",
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
    chosen = job_of(job, None)
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
        say(f"What is done is in {out}; the same command goes on from there.", 130)
        raise
    console = printer()
    for grid in (results(found), costs(found)):
        for table in terminal(grid, console.width):
            console.print()
            console.print(table)
        console.print(" ".join(grid.caption))
    console.print()
    for note in found["notes"]:
        console.print(note)
    print(f"Wrote {out / 'compare.html'}, with compare.json, table.md and table.tex beside it.")


@commands.command(epilog=examples("fedgrove demo", "fedgrove demo --out runs/first"))
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
