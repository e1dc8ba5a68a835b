"""What the page says in words and tables beside the figures, as plain data for the template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any

from fedgrove.ground import words
from fedgrove.report.compare import Comparison, Row, unseen
from fedgrove.report.data import Run


@dataclass(frozen=True)
class Tile:
    """One large number with what it means."""

    value: str
    label: str
    note: str = ""


def headline(run: Run) -> str:
    """One sentence on what ran."""
    trained, rounds = len(run.clients), run.summary.get("rounds", 0)
    model, data = PurePath(run.setting("model", "name") or "a model").name, run.data_name
    said = words.count(trained, "client")
    if trained > 1 and not run.alone:
        said += " together"
    said += f" fine-tuned {model}"
    if data:
        said += f" on {data}"
    said += ", each on its own," if run.alone else f" with {run.method}"
    return f"{said} in {words.count(rounds, 'round')}{_ranks(run)} (seed {run.summary.get('seed')})"


def _ranks(run: Run) -> str:
    """`` at LoRA rank 8``; "" where none is recorded."""
    ranks = sorted({row["rank"] for row in run.clients.values() if row.get("rank")})
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f" at LoRA rank {ranks[0]}"
    return f" at LoRA ranks {ranks[0]} to {ranks[-1]}"


def settings(run: Run) -> list[tuple[str, str]]:
    """The handful of settings that a reader looks for first; the whole job is at the end of the
    page.
    """
    found: list[tuple[str, Any]] = [
        ("method", run.method),
        ("model", run.setting("model", "name")),
        ("task", run.summary.get("task")),
        ("data", run.data_name),
        ("clients", _clients(run)),
        ("clients in a round", _share(run)),
        ("head", run.setting("federation", "head")),
        ("rounds", run.summary.get("rounds")),
        ("privacy", _privacy(run)),
        ("local work", _local_work(run)),
        ("seed", run.summary.get("seed")),
    ]
    return [(name, str(value)) for name, value in found if value is not None and value != ""]


def _clients(run: Run) -> str:
    trained = f"{len(run.clients):,}"
    if run.newcomers:
        return f"{trained} + {len(run.newcomers):,} held out"
    return trained


def _share(run: Run) -> str | None:
    """Of the clients, in a round."""
    share = run.setting("federation", "fraction")
    if share is None:
        return None
    if share == 1:
        return "all"
    return f"{100 * share:g} %"


def tiles(run: Run, comparison: Comparison) -> list[Tile]:
    ours, percent = comparison.ours, run.percent
    before = [
        (name, row)
        for name, row in (("base", comparison.base), ("alone", comparison.local))
        if row and row.values
    ]

    def beside(statistic: str) -> str:
        return ", ".join(
            f"{name} {_score(getattr(row, statistic), percent)}" for name, row in before
        )

    found = [Tile(_score(ours.mean, percent), f"mean {run.metric}", beside("mean"))]
    if len(run.clients) > 1:
        found.append(
            Tile(_score(ours.tail, percent), "tail: the 10th-percentile client", beside("tail"))
        )
    gains, reference = comparison.gains(), comparison.reference
    if gains and reference and len(gains) > 1:
        than = {"local": "than training alone", "base": "than with the base"}.get(
            reference.kind, f"than in {reference.note}"
        )
        better = sum(gain > 0 for gain in gains.values())
        found.append(Tile(f"{better:,} of {len(gains):,}", f"clients do better {than}"))
    sent = run.summary.get("bytes", {})
    if sent.get("up") or sent.get("down"):
        found.append(
            Tile(
                words.size(sent.get("up", 0)),
                "sent up in the whole run",
                f"down {words.size(sent.get('down', 0))}",
            )
        )
    found.append(
        Tile(
            words.duration(run.summary.get("seconds", {}).get("total")),
            "wall time, from start to end",
        )
    )
    return found


def comparison_rows(run: Run, comparison: Comparison) -> list[dict[str, str]]:
    """mean, std, tail and worst client of every row, with the row's colour."""
    return [_comparison_row(row, run) for row in [*comparison.rows, *unseen(run)]]


def _comparison_row(row: Row, run: Run) -> dict[str, str]:
    worst = row.values.get(row.worst)
    return {
        "kind": row.kind,
        "label": row.label,
        "note": row.note,
        "clients": str(len(row.values)),
        "mean": _score(row.mean, run.percent),
        "std": _score(row.std, run.percent),
        "tail": _score(row.tail, run.percent),
        "worst": _score(worst, run.percent),
        "who": words.shorten(row.worst, 24),
    }


def cost_rows(run: Run) -> list[tuple[str, str, str]]:
    """(what, how much, meaning): numbers that are easily confused, one under the other."""
    parameters, total = run.summary.get("parameters", {}), run.summary.get("bytes", {})
    meanings = (
        ("trained", "trained", "change while a client trains"),
        ("stored", "stored", "make up a client’s own model, beside the base that all share"),
        ("sent_up", "sent up", "leave a client in a round"),
        ("sent_down", "sent down", "reach a client in a round"),
    )
    rows = [
        (f"parameters {name}", f"{parameters[key]:,}", meaning)
        for key, name, meaning in meanings
        if parameters.get(key) is not None
    ]
    for key, name in (("bytes_up", "up"), ("bytes_down", "down")):
        each = [line[key] for line in run.trained if line.get(key) is not None]
        if each:
            rows.append(
                (
                    f"bytes {name} in a round",
                    words.size(median(each)),
                    "one client, as encoded for the wire",
                )
            )
    rows += [
        (f"bytes {name} in the run", words.size(total[name]), "all clients and rounds together")
        for name in ("up", "down")
        if name in total
    ]
    return rows


def time_rows(run: Run) -> list[tuple[str, str, float]]:
    """(what, duration, share of the total in percent); what is left over (loading, export) is a row
    of its own.
    """
    seconds = run.summary.get("seconds", {})
    total = seconds.get("total") or 0.0
    parts = [
        ("local training", seconds.get("training")),
        ("evaluation", seconds.get("evaluation")),
        ("server", seconds.get("server")),
    ]
    known = [(name, float(value)) for name, value in parts if value is not None]
    rest = total - sum(value for _, value in known)
    if rest > 0.005 * total:
        known.append(("the rest: loading, writing", rest))
    rows = [
        (name, words.duration(value), 100 * value / total if total else 0.0)
        for name, value in known
    ]
    return [*rows, ("total", words.duration(total), 100.0)]


def _score(value: float | None, percent: bool) -> str:
    return words.typographic(words.score(value, percent=percent))


def _privacy(run: Run) -> str | None:
    """ε of what the run had: "ε 3.21 at δ 0.0014 for a client"; None where it had no protection."""
    spent = run.summary.get("privacy") or {}
    found = []
    for level, whom in (("client", "for a client"), ("example", "at most, for an example")):
        if level not in spent:
            continue
        budget = spent[level]
        if budget.get("epsilon") is None:
            found.append(f"no guarantee {whom.removeprefix('at most, ')} (no noise)")
            continue
        if "delta" in budget:
            at = f" at δ {budget['delta']:.2g}"
        else:
            at = ""
        if budget.get("randomness") == "seed":
            known = ", noise from the seed: an experiment"
        else:
            known = ""
        found.append(f"ε {budget['epsilon']:.3g}{at} {whom}{known}")
    if spent.get("secure_aggregation"):
        found.append("secure aggregation")
    return "; ".join(found) or None


def _local_work(run: Run) -> str | None:
    epochs, steps = run.setting("train", "local_epochs"), run.setting("train", "local_steps")
    if epochs:
        return words.count(epochs, "epoch")
    if steps:
        return words.count(steps, "step")
    return None
