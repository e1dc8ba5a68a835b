"""How far an aggregation is: a bar on a terminal, a line per phase elsewhere. Both on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Opens a phase of so many steps; the result is called once for each.
Phase = Callable[[str, int], Callable[[], None]]


def silent(words: str, steps: int) -> Callable[[], None]:
    return lambda: None


@contextmanager
def shown(console: Console | None = None) -> Iterator[Phase]:
    console = console or Console(stderr=True)
    if not console.is_terminal:

        def plain(words: str, steps: int) -> Callable[[], None]:
            console.file.write(f"{words} ({steps})\n")
            console.file.flush()
            return lambda: None

        yield plain
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:

        def phase(words: str, steps: int) -> Callable[[], None]:
            number = bar.add_task(words, total=steps)
            return lambda: bar.advance(number)

        yield phase
