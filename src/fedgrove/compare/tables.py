"""One table, four ways: the terminal, Markdown, LaTeX (booktabs) and the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedgrove.ground import words
from fedgrove.job.toml import value_text

if TYPE_CHECKING:
    from rich.table import Table
    from tabulate import TableFormat

MISSING = "–"
COUNTS = {"trained": "trained", "stored": "stored", "sent_up": "sent up", "sent_down": "sent down"}
_TEX = {
    "\\": r"\textbackslash{}",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "Δ": r"$\Delta$",
    "<": r"$<$",
    ">": r"$>$",
    "×": r"$\times$",
    "…": r"\ldots{}",
    "’": "'",
}


@dataclass(frozen=True)
class Cell:
    """A cell's text; ``best`` is printed bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """The finished table: headings, rows of cells (the first one a label), and what has to be said
    about it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: tuple[str, ...]  # sentences


@dataclass(frozen=True)
class _Column:
    heading: str
    text: Callable[[Mapping[str, Any]], str]
    value: Callable[[Mapping[str, Any]], float | None] | None = (
        None  # the highest is best; None: nobody is
    )


def results(content: Mapping[str, Any]) -> Grid:
    """How good: each method as it is and after fine-tuning, on clients that trained and on those
    that never did.
    """
    epochs = content["final_local_epochs"]
    columns = [
        *_score_columns(content, "metric", ""),
        *_score_columns(content, "metric_tuned", f" +{epochs} ep."),
    ]
    if content.get("writes"):  # texts are scored by a few words each; the loss sees every one
        columns.append(_loss_column())
    if content["held_out"]:
        columns += _unseen_columns(content, epochs)
    columns += [
        _p_column(content, "metric", "p"),
        _p_column(content, "metric_tuned", f"p +{epochs} ep."),
    ]
    title = f"{content['metric'].capitalize()} of each client’s own model on its own test data"
    return _grid(
        title + (", in %" if content["percent"] else ""),
        columns,
        content,
        caption(content),
        base=True,
    )


def costs(content: Mapping[str, Any]) -> Grid:
    """What it takes: traffic of all clients in a run, seconds, and parameters of the median
    client.
    """
    columns = [
        _Column("bytes up", lambda row: words.size(row["bytes"]["up"])),
        _Column("bytes down", lambda row: words.size(row["bytes"]["down"])),
        _Column("time", lambda row: words.duration(row["seconds"])),
        *(_count(key, heading) for key, heading in COUNTS.items()),
    ]
    if content["tuning"]:
        columns.insert(0, _Column("tuned to", lambda row: chosen(row["chosen"])))
    note = (
        "Bytes are those of all clients in a whole run, seconds those of a run on this machine, "
        "both means over seeds.",
        "Trained, stored and sent are numbers of parameters of the median client (sent: in one "
        "round).",
    )
    return _grid("Traffic, time and parameters", columns, content, note, base=False)


def caption(content: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader must know to trust the table, in sentences."""
    seeds, epochs, tests = (
        content["seeds"],
        content["final_local_epochs"],
        content["tests"]["metric"],
    )
    n = max((test["n"] for test in tests["against_best"].values()), default=0)
    plural = len(seeds) > 1
    if plural:
        over = f"Mean over clients, then mean ± standard deviation over {len(seeds)} seeds"
    else:
        over = "Mean over clients, one seed"
    writes = content.get("writes", False)
    said = [
        *([] if writes else [f"Head: {content['head']} for every method."]),
        f"{over}; tail is the 10th-percentile client, worst the single weakest.",
        f"“+{epochs} ep.” is the same model after {words.count(epochs, 'epoch')} of local "
        f"fine-tuning at each client, "
        "the same for every method.",
    ]
    if n:
        tuned = content["tests"]["metric_tuned"]["best"]
        said.append(
            f"p: two-sided Wilcoxon signed-rank test against the best ({tests['best']}; "
            f"fine-tuned: {tuned}), paired "
            f"over seeds × clients (n = {n}), Holm-adjusted; clients of one seed are not "
            f"independent of each other."
        )
    if content["held_out"]:
        said.append(
            f"Unseen: {words.count(content['held_out'], 'client')} in each seed that never trained."
        )
    base = "the frozen model" + " with a head trained alone" * (not writes)
    alone = content["methods"][0]["label"]  # the reference comes first
    said.append(f"Base is {base}; {alone} is each client training alone.")
    if content["tuning"]:
        count = len(next(iter(content["tuning"]["methods"].values()))["trials"])
        said.append(
            f"Tuned by {count} trials for each method on a validation split, on seed "
            f"{content['tuning']['seed']}, "
            "which is not reported."
        )
    return tuple(said)


def chosen(values: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{key.split('.')[-1]} {value_text(value)}" for key, value in values.items())
        or MISSING
    )


def markdown(grids: Sequence[Grid]) -> str:
    """GitHub's tables; the best of a column is bold."""
    parts = []
    for grid in grids:
        table = _tabulated(grid, "pipe", _md, "**{}**")
        caption = " ".join(map(_md, grid.caption))
        parts.append(f"**{grid.title}**\n\n{table}\n\n{caption}")
    return "\n\n".join(parts) + "\n"


def latex(grids: Sequence[Grid]) -> str:
    """``table`` floats with booktabs rules (``\\usepackage{booktabs, graphicx}``); wide ones shrink
    to the line.
    """
    parts = ["% \\usepackage{booktabs, graphicx}"]
    for grid in grids:
        caption = " ".join(map(_tex, grid.caption))
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(grid.title)}. {caption}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            _tabulated(grid, _booktabs(len(grid.headings)), _tex, r"\textbf{{{}}}") + "}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _tabulated(
    grid: Grid, form: str | TableFormat, escaped: Callable[[str], str], bold: str
) -> str:
    from tabulate import tabulate

    def shown(cell: Cell) -> str:
        if cell.best:
            return bold.format(escaped(cell.text))
        return escaped(cell.text)

    return tabulate(
        [[shown(cell) for cell in row] for row in grid.rows],
        headers=[escaped(heading) for heading in grid.headings],
        tablefmt=form,
        disable_numparse=True,  # every cell is a text already
        colalign=["left"] + ["right"] * (len(grid.headings) - 1),
    )


def _booktabs(columns: int) -> TableFormat:
    """tabulate's own LaTeX formats escape cells, or have no booktabs rules."""
    from tabulate import DataRow, Line, TableFormat

    row = DataRow("", " & ", r" \\")
    begin = rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}"
    return TableFormat(
        lineabove=Line(begin + "\n" + r"\toprule", "", "", ""),
        linebelowheader=Line(r"\midrule", "", "", ""),
        linebetweenrows=None,
        linebelow=Line(r"\bottomrule" + "\n" + r"\end{tabular}", "", "", ""),
        headerrow=row,
        datarow=row,
        padding=0,
        with_header_hide=None,
    )


def terminal(grid: Grid, width: int) -> list[Table]:
    """The table for a terminal of ``width`` columns, in several parts below each other where it
    does not fit.
    """
    from rich.table import Table
    from rich.text import Text

    widths = [max(len(text) for text in each) for each in zip(*_texts(grid), strict=True)]
    parts: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if parts[-1] and sum(widths[c] + 2 for c in [0, *parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    tables = []
    for number, part in enumerate(parts):
        if not number:
            title = Text(grid.title)
        else:
            title = None
        table = Table(
            title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for column in (0, *part):
            table.add_column(
                Text(grid.headings[column]), justify="right" if column else "left", no_wrap=True
            )
        for row in grid.rows:
            table.add_row(
                *(Text(row[c].text, style="bold" if row[c].best else "") for c in (0, *part))
            )
        tables.append(table)
    return tables


def _texts(grid: Grid) -> list[list[str]]:
    return [list(grid.headings), *([cell.text for cell in row] for row in grid.rows)]


# ------------------------------------------------------------------ columns


def _score_columns(content: Mapping[str, Any], measure: str, suffix: str) -> list[_Column]:
    percent = content["percent"]

    def part(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda row: row.get(measure, {}).get(name)

    def spread(row: Mapping[str, Any]) -> str:
        both = row.get(measure, {})
        return with_std(both.get("mean"), both.get("std"), percent)

    return [
        _Column(f"mean{suffix}", spread, part("mean")),
        _Column(
            f"tail 10 %{suffix}", lambda row: number(part("tail10")(row), percent), part("tail10")
        ),
        _Column(f"worst{suffix}", lambda row: number(part("worst")(row), percent), part("worst")),
    ]


def _loss_column() -> _Column:
    def mean(row: Mapping[str, Any]) -> float | None:
        found: float | None = row.get("loss", {}).get("mean")
        return found

    def text(row: Mapping[str, Any]) -> str:
        return with_std(mean(row), row.get("loss", {}).get("std"), False)

    return _Column("loss", text, lambda row: None if (loss := mean(row)) is None else -loss)


def _unseen_columns(content: Mapping[str, Any], epochs: int) -> list[_Column]:
    percent = content["percent"]

    def column(measure: str, heading: str) -> _Column:
        def of(row: Mapping[str, Any]) -> Mapping[str, Any]:
            return (row.get("unseen") or {}).get(measure) or {}

        return _Column(
            heading,
            lambda row: with_std(of(row).get("mean"), of(row).get("std"), percent),
            lambda row: of(row).get("mean"),
        )

    return [column("metric", "unseen"), column("metric_tuned", f"unseen +{epochs} ep.")]


def _p_column(content: Mapping[str, Any], measure: str, heading: str) -> _Column:
    tests = content["tests"][measure]

    def text(row: Mapping[str, Any]) -> str:
        if row["label"] == tests["best"]:
            return "best"
        test = tests["against_best"].get(row["label"])
        if test:
            return p_value(test["p_holm"])
        return MISSING

    return _Column(heading, text)


def _count(key: str, heading: str) -> _Column:
    return _Column(heading, lambda row: f"{row['parameters'][key]:,.0f}")


def number(value: float | None, percent: bool) -> str:
    """``61.3`` (of 0.613) or ``0.613``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if percent:
        return f"{100 * value:.1f}"
    return f"{value:.3f}"


def with_std(value: float | None, std: float | None, percent: bool) -> str:
    return number(value, percent) + (
        f" ± {number(std, percent)}" if std is not None and value is not None else ""
    )


def p_value(p: float) -> str:
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}"


def _grid(
    title: str,
    columns: Sequence[_Column],
    content: Mapping[str, Any],
    caption: tuple[str, ...],
    *,
    base: bool,
) -> Grid:
    methods: list[Mapping[str, Any]] = list(content["methods"])
    found: list[list[Cell]] = []
    top: list[float | None] = []
    for column in columns:
        known = [v for row in methods if column.value and (v := column.value(row)) is not None]
        top.append(max(known) if len(set(known)) > 1 else None)
    for row in [content["base"], *methods] if base else methods:
        cells = [Cell(row["label"])]
        for column, best in zip(columns, top, strict=True):
            if column.value:
                value = column.value(row)
            else:
                value = None
            is_best = (
                best is not None
                and value is not None
                and row is not content["base"]
                and value == best
            )
            cells.append(Cell(column.text(row), is_best))
        found.append(cells)
    headings = ("method", *(column.heading for column in columns))
    return Grid(title, headings, tuple(map(tuple, found)), caption)


def _md(text: str) -> str:
    return "".join("\\" + letter if letter in "\\|*_`[]<" else letter for letter in text)


def _tex(text: str) -> str:
    # what follows the end of a line must not look like an argument of it
    if text[:1] in ("[", "*"):
        guard = "{}"
    else:
        guard = ""
    return guard + "".join(
        _TEX.get(letter, letter) for letter in text.replace("“", "``").replace("”", "''")
    )
