"""The application: its commands, and one call of it from arguments to an exit code."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import click
import typer

import fedgrove
from fedgrove.cli import audits, columns, files, jobs, models, pools, runs
from fedgrove.cli.shared import examples, say
from fedgrove.deploy.cli import app as deploy
from fedgrove.ground.errors import FedgroveError

app = typer.Typer(
    name="fedgrove",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

for group in (runs, jobs, models, audits, pools, files):
    app.add_typer(group.commands)
app.add_typer(columns.app)
app.add_typer(deploy)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedgrove {fedgrove.__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "fedgrove demo                          (a whole federation in a few minutes)",
        "fedgrove init job.toml                 (a commented job to start from)",
        "fedgrove data job.toml                 (who would hold what)",
        "fedgrove run job.toml --rounds 20      (run it)",
        'fedgrove predict runs/fedit --client tweets-0 "what a day"',
    )
)
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version.",
            callback=_version,
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from.", show_default=False)
    ] = False,
) -> None:
    """Federated fine-tuning with LoRA: clients train on their own data, and each leaves with its
    own PEFT adapter.
    """


def console() -> int:
    """``main`` as a process of its own, which looks for garbage less often.

    What the libraries' imports make stays: going through it again and again is a tenth of the
    start, and once more at the end a second.
    """
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)
    return main()


def program() -> click.Command:
    """The application as click runs it, with each command's first paragraph on one line: the table
    of commands keeps line breaks.
    """
    whole = typer.main.get_command(app)
    todo = [whole]
    while todo:
        command = todo.pop()
        first = (command.help or "").split("\n\n")[0]
        command.short_help = " ".join(first.split())
        todo.extend(getattr(command, "commands", {}).values())
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for what the user can mend, 1 for what we must, 130
    for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:  # welcome anywhere, though it belongs to the root command
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    try:
        code = program().main(arguments, prog_name="fedgrove", standalone_mode=False)
        sys.stdout.flush()
        # typer turns Ctrl-C into this code without a word
        if code == 130:
            return say("Interrupted.", code)
        return int(code or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return say("Interrupted.", 130)
    except BrokenPipeError:
        # The reader has left (`| head`); what Python would still flush at exit must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        sentence, code = explain(error)
        return say(f"Error: {sentence}", code)


def explain(error: Exception) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    if isinstance(error, FedgroveError):
        return str(error), 2
    if isinstance(error, OSError):
        file = error.filename
    else:
        file = None
    number = getattr(error, "errno", None)
    if file:
        where = f" while writing {file}"
    else:
        where = ""
    elsewhere = "free some, or choose another place with --out."
    if number == errno.ENOSPC or "No space left on device" in str(error):
        return f"There is no space left on the disk{where}; {elsewhere}", 2
    if number == errno.EDQUOT:
        return f"The disk quota is used up{where}; {elsewhere}", 2
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
