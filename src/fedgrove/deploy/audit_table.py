"""``fedgrove deploy log``: a site's audit log as a table for people."""

from __future__ import annotations

import sys
from pathlib import Path

from fedgrove.deploy.audit import LOG, LogEntry, broken, read
from fedgrove.deploy.certificates import DeployError


def show(folder: Path, *, last: int = 0, tensors: bool = False) -> bool:
    """Print the log and its totals; False where it was changed after it was written."""
    from rich.console import Console
    from rich.table import Table

    path = folder / LOG
    if not path.exists():
        raise DeployError(f"There is no {path}; a site that has exchanged a message has one.")
    entries = list(read(path))
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    table = Table(
        "time (UTC)",
        "run",
        "round",
        "",
        "kind",
        "bytes",
        "tensors",
        "SHA-256",
        "note",
        box=None,
        pad_edge=False,
    )
    for entry in entries[-last:] if last else entries:
        table.add_row(*_row(entry))
        if tensors:
            for name, dtype, shape in entry.tensors:
                table.add_row(
                    "", "", "", "", "", "", "", f"{name}  {dtype} {' x '.join(map(str, shape))}", ""
                )
    console.print(table)
    for direction in ("received", "sent"):
        chosen = [entry for entry in entries if entry.direction == direction]
        console.print(
            f"{direction}: {len(chosen)} messages, {sum(entry.bytes for entry in chosen):,} bytes"
        )
    wrong = broken(path)
    if wrong:
        console.print(f"The log was changed or cut at line {', '.join(map(str, wrong[:5]))}.")
    else:
        console.print("The log is whole: each line follows from the one before it.")
    return not wrong


def _row(entry: LogEntry) -> tuple[str, ...]:
    if entry.direction == "received":
        arrow = "<- in"
    else:
        arrow = "-> out"
    if entry.tensors:
        what = f"{len(entry.tensors)} ({entry.numbers:,} numbers)"
    else:
        what = ""
    return (
        entry.when, entry.run[:8], str(entry.round or ""), arrow, entry.kind,
        f"{entry.bytes:,}", what, entry.sha256[:16], entry.note,
    )  # fmt: skip
