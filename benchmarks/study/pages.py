"""The study's pages: Markdown tables, and the block of docs/results.md that holds the claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from study.results import FieldResult

BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"


def claims_table(rows: Sequence[dict[str, Any]]) -> str:
    """The claims, one a line."""
    shown = []
    for row in rows:
        effect = row["effect"]
        shown.append(
            [
                row["text"],
                row["paper"],
                row["field"],
                "–" if effect is None else f"{effect['mean']:+.3f}",
                _interval(effect),
                row["isolates"],
                row["verdict"],
                row["why"],
            ]
        )
    heads = ["claim", "of", "field", "effect", "95 % interval", "what differs", "verdict", "why"]
    return tabulate(shown, heads, tablefmt="github", disable_numparse=True)


def _interval(effect: dict[str, Any] | None) -> str:
    if effect is None:
        return "–"
    if effect["low"] is None:
        return f"none ({effect['seeds']} seed)"
    return f"{effect['low']:+.3f} to {effect['high']:+.3f} ({effect['seeds']} seeds)"


def field_table(result: FieldResult) -> str:
    """The methods on one field, its ceilings, and whether it carries claims."""
    field = result.field
    rows = result.table()
    heads = [
        key for key in (rows[0] if rows else {}) if key not in ("recovery", "settings", "seeds")
    ]
    lines = [[_cell(row.get(key)) for key in heads] + [len(row["seeds"])] for row in rows]
    recovered = [
        f"- `{row['method']}` finds the groups at an adjusted Rand index, layer by layer, of "
        + ", ".join(f"{value:.2f}" for value in row["recovery"])
        for row in rows
        if row["recovery"]
    ]
    parts = [
        f"## {field.title} (`{field.name}`)",
        f"Differs between clients: {field.differs}. Job of the papers' size: "
        f"`{field.full or 'none'}`.",
        f"Ceilings: {ceilings_line(result)}.",
        tabulate(lines, [*heads, "seeds"], tablefmt="github", disable_numparse=True),
        "\n".join(recovered),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ceilings_line(result: FieldResult) -> str:
    """A field's ceilings, and whether claims may rest on it."""
    said = {True: "honest", False: "not honest", None: "not known yet"}
    return f"{_ceilings(result)}: {said[result.honest()]}"


def _ceilings(result: FieldResult) -> str:
    found = result.ceilings()
    told = [
        f"{name} {found[name]['mean']:+.3f}"
        for name in (
            "oracle above base",
            "pooled above base",
            "oracle above FedIT",
            "local above FedIT",
        )
        if found[name]
    ]
    return ", ".join(told) or "not run yet"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def replaced(page: Path, block: str) -> None:
    """Put ``block`` between the page's markers."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")


def machine_note(machine: dict[str, Any]) -> str:
    return f"Machine: {machine['cores']} cores, {machine['processor']}; {json.dumps(machine['versions'])}\n"
