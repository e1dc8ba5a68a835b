"""One table, four ways: the terminal, Markdown, LaTeX (booktabs) and the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgrove.ground import words
from fedgrove.ground.plain import Given
from fedgrove.job.toml import value_text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from tabulate import TableFormat

MISSING = "–"
COUNTS = {
    "trained": "trained",
    "stored": "stored",
    "sent_up": "sent up",
    "sent_down": "sent down",
}
_MD = {letter: "\\" + letter for letter in "\\|*_`[]<"}
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
    text: Callable[[Given], str]
    # the highest is best; None: nobody is
    value: Callable[[Given], float | None] | None = None


def results(content: Given) -> Grid:
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
    columns.append(_p_column(content, "metric", "p"))
    columns.append(_p_column(content, "metric_tuned", f"p +{epochs} ep."))
    metric = content["metric"].capitalize()
    title = f"{metric} of each client’s own model on its own test data"
    if content["percent"]:
        title += ", in %"
    return _grid(title, columns, content, caption(content), base=True)


def costs(content: Given) -> Grid:
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


def caption(content: Given) -> tuple[str, ...]:
    """What a reader must know to trust the table, in sentences."""
    seeds = len(content["seeds"])
    epochs = content["final_local_epochs"]
    tests = content["tests"]["metric"]
    pairs = [test["n"] for test in tests["against_best"].values()]
    n = max(pairs, default=0)
    over = "Mean over clients, one seed"
    if seeds > 1:
        over = f"Mean over clients, then mean ± standard deviation over {seeds} seeds"
    writes = content.get("writes", False)
    said = []
    base = "the frozen model"
    if not writes:
        said.append(f"Head: {content['head']} for every method.")
        base = "the frozen model with a head trained alone"
    said.append(f"{over}; tail is the 10th-percentile client, worst the single weakest.")
    said.append(
        f"“+{epochs} ep.” is the same model after {words.count(epochs, 'epoch')} of local "
        f"fine-tuning at each client, the same for every method."
    )
    if n:
        tuned = content["tests"]["metric_tuned"]["best"]
        said.append(
            f"p: two-sided Wilcoxon signed-rank test against the best ({tests['best']}; "
            f"fine-tuned: {tuned}), paired "
            f"over seeds × clients (n = {n}), Holm-adjusted; clients of one seed are not "
            f"independent of each other."
        )
    if content["held_out"]:
        newcomers = words.count(content["held_out"], "client")
        said.append(f"Unseen: {newcomers} in each seed that never trained.")
    alone = content["methods"][0]["label"]  # the reference comes first
    said.append(f"Base is {base}; {alone} is each client training alone.")
    tuning = content["tuning"]
    if tuning:
        anyone = next(iter(tuning["methods"].values()))
        said.append(
            f"Tuned by {len(anyone['trials'])} trials for each method on a validation split, on "
            f"seed {tuning['seed']}, which is not reported."
        )
    return tuple(said)


def chosen(values: Given) -> str:
    parts = []
    for key, value in values.items():
        *_, name = key.split(".")
        parts.append(f"{name} {value_text(value)}")
    return ", ".join(parts) or MISSING


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
    grid: Grid,
    form: str | TableFormat,
    escaped: Callable[[str], str],
    bold: str,
) -> str:
    from tabulate import tabulate

    def shown(cell: Cell) -> str:
        if cell.best:
            return bold.format(escaped(cell.text))
        return escaped(cell.text)

    numbers = len(grid.headings) - 1
    return tabulate(
        [[shown(cell) for cell in row] for row in grid.rows],
        headers=[escaped(heading) for heading in grid.headings],
        tablefmt=form,
        disable_numparse=True,  # every cell is a text already
        colalign=["left"] + ["right"] * numbers,
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

    tables: list[Table] = []
    for part in _parts(grid, width):
        title = None
        if not tables:
            title = Text(grid.title)
        table = Table(
            title=title,
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        table.add_column(Text(grid.headings[0]), justify="left", no_wrap=True)
        for column in part:
            table.add_column(Text(grid.headings[column]), justify="right", no_wrap=True)
        for row in grid.rows:
            cells = [row[column] for column in (0, *part)]
            table.add_row(*(_shown(cell) for cell in cells))
        tables.append(table)
    return tables


def _shown(cell: Cell) -> Text:
    from rich.text import Text

    style = ""
    if cell.best:
        style = "bold"
    return Text(cell.text, style=style)


def _parts(grid: Grid, width: int) -> list[list[int]]:
    """The columns that stand beside each other, the labels before each part."""
    widths = []
    for column, heading in enumerate(grid.headings):
        texts = [heading, *(row[column].text for row in grid.rows)]
        longest = max(len(text) for text in texts)
        widths.append(longest + 2)
    first, *others = widths
    parts: list[list[int]] = [[]]
    taken = first
    for column, each in enumerate(others, start=1):
        if parts[-1] and taken + each > width:
            parts.append([])
            taken = first
        parts[-1].append(column)
        taken += each
    return parts


# ------------------------------------------------------------------ columns


def _score_columns(content: Given, measure: str, suffix: str) -> list[_Column]:
    percent = content["percent"]

    def mean(row: Given) -> float | None:
        return _part(row, measure, "mean")

    def spread(row: Given) -> str:
        std = _part(row, measure, "std")
        return with_std(mean(row), std, percent)

    def column(heading: str, name: str) -> _Column:
        def value(row: Given) -> float | None:
            return _part(row, measure, name)

        def text(row: Given) -> str:
            return number(value(row), percent)

        return _Column(heading, text, value)

    return [
        _Column(f"mean{suffix}", spread, mean),
        column(f"tail 10 %{suffix}", "tail10"),
        column(f"worst{suffix}", "worst"),
    ]


def _part(row: Given, measure: str, name: str) -> float | None:
    """A statistic of a row; None where the row has none."""
    statistics: Given = row.get(measure) or {}
    found: float | None = statistics.get(name)
    return found


def _loss_column() -> _Column:
    def text(row: Given) -> str:
        mean = _part(row, "loss", "mean")
        std = _part(row, "loss", "std")
        return with_std(mean, std, False)

    def value(row: Given) -> float | None:
        mean = _part(row, "loss", "mean")
        if mean is None:
            return None
        return -mean  # the lowest is best

    return _Column("loss", text, value)


def _unseen_columns(content: Given, epochs: int) -> list[_Column]:
    percent = content["percent"]

    def column(measure: str, heading: str) -> _Column:
        def mean(row: Given) -> float | None:
            return _part(row.get("unseen") or {}, measure, "mean")

        def text(row: Given) -> str:
            std = _part(row.get("unseen") or {}, measure, "std")
            return with_std(mean(row), std, percent)

        return _Column(heading, text, mean)

    return [column("metric", "unseen"), column("metric_tuned", f"unseen +{epochs} ep.")]


def _p_column(content: Given, measure: str, heading: str) -> _Column:
    tests = content["tests"][measure]

    def text(row: Given) -> str:
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


def with_std(
    value: float | None,
    std: float | None,
    percent: bool,
) -> str:
    text = number(value, percent)
    if std is None or value is None:
        return text
    return f"{text} ± {number(std, percent)}"


def p_value(p: float) -> str:
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}"


def _grid(
    title: str,
    columns: Sequence[_Column],
    content: Given,
    caption: tuple[str, ...],
    *,
    base: bool,
) -> Grid:
    methods: list[Given] = list(content["methods"])
    top = [_best(column, methods) for column in columns]
    found = []
    if base:
        row = content["base"]
        texts = [column.text(row) for column in columns]
        found.append((Cell(row["label"]), *map(Cell, texts)))
    for row in methods:
        cells = [Cell(row["label"])]
        for column, best in zip(columns, top, strict=True):
            is_best = False
            if column.value and best is not None:
                is_best = column.value(row) == best
            cells.append(Cell(column.text(row), is_best))
        found.append(tuple(cells))
    headings = ("method", *(column.heading for column in columns))
    return Grid(title, headings, tuple(found), caption)


def _best(column: _Column, rows: Sequence[Given]) -> float | None:
    """The highest value of a column; None where all are alike, or nobody is best."""
    if column.value is None:
        return None
    values = [column.value(row) for row in rows]
    known = [value for value in values if value is not None]
    if len(set(known)) > 1:
        return max(known)
    return None


def _md(text: str) -> str:
    return "".join(_MD.get(letter, letter) for letter in text)


def _tex(text: str) -> str:
    # what follows the end of a line must not look like an argument of it
    guard = ""
    if text[:1] in ("[", "*"):
        guard = "{}"
    quoted = text.replace("“", "``").replace("”", "''")
    return guard + "".join(_TEX.get(letter, letter) for letter in quoted)
