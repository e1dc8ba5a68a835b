"""What the page says in words and tables beside the figures, as plain data for the template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from statistics import median

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
    trained = len(run.clients)
    model = run.setting("model", "name") or "a model"
    said = words.count(trained, "client")
    if trained > 1 and not run.alone:
        said += " together"
    said += f" fine-tuned {PurePath(model).name}"
    if run.data_name:
        said += f" on {run.data_name}"
    if run.alone:
        said += ", each on its own,"
    else:
        said += f" with {run.method}"
    rounds = words.count(run.summary.get("rounds", 0), "round")
    seed = run.summary.get("seed")
    return f"{said} in {rounds}{_ranks(run)} (seed {seed})"


def _ranks(run: Run) -> str:
    """`` at LoRA rank 8``; "" where none is recorded."""
    given = [row.get("rank") for row in run.clients.values()]
    ranks = [rank for rank in given if rank]
    if not ranks:
        return ""
    least = min(ranks)
    most = max(ranks)
    if least == most:
        return f" at LoRA rank {least}"
    return f" at LoRA ranks {least} to {most}"


def settings(run: Run) -> list[tuple[str, str]]:
    """The handful of settings that a reader looks for first; the whole job is at the end of the
    page.
    """
    found = {
        "method": run.method,
        "model": run.setting("model", "name"),
        "starts from": run.setting("model", "adapter"),
        "task": run.summary.get("task"),
        "data": run.data_name,
        "clients": _clients(run),
        "clients in a round": _share(run),
        "clients measured": _measured(run),
        "head": run.setting("federation", "head"),
        "rounds": _rounds(run),
        "models of": _kept(run),
        "privacy": _privacy(run),
        "local work": _local_work(run),
        "seed": run.summary.get("seed"),
    }
    known = {name: value for name, value in found.items() if value is not None and value != ""}
    return [(name, str(value)) for name, value in known.items()]


def _rounds(run: Run) -> str | None:
    """How many there were, and how many the job had where it stopped before."""
    done = run.summary.get("rounds")
    if run.summary.get("stopped_early"):
        return f"{done} of {run.setting('run', 'rounds')} (run.patience)"
    return done


def _kept(run: Run) -> str | None:
    """Which round's models these are, where the job chose among rounds."""
    kept = run.summary.get("kept")
    if not kept:
        return None
    if run.setting("run", "keep") != "best":
        return f"round {kept['round']}, the last"
    if "best" not in kept:
        return f"round {kept['round']}, the last: in no round was every client measured"
    said = f"round {kept['round']}, the best by {run.metric} on the clients’ {kept['split']} rows"
    if kept["split"] == "test":
        return f"{said}, which makes the figures here optimistic"
    return said


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


def _measured(run: Run) -> str | None:
    """How many of the clients the figures are of, where the job asked for some of them."""
    told = run.summary.get("measured")
    if not told:
        return None
    return f"{told['clients']:,} of {told['of']:,}, drawn anew in each evaluated round"


def tiles(run: Run, comparison: Comparison) -> list[Tile]:
    ours = comparison.ours
    percent = run.percent

    def beside(statistic: str) -> str:
        parts = []
        for name, row in (("base", comparison.base), ("alone", comparison.local)):
            if row and row.values:
                score = _score(getattr(row, statistic), percent)
                parts.append(f"{name} {score}")
        return ", ".join(parts)

    mean = _score(ours.mean, percent)
    found = [Tile(mean, f"mean {run.metric}", beside("mean"))]
    if len(run.clients) > 1:
        tail = _score(ours.tail, percent)
        found.append(Tile(tail, "tail: the 10th-percentile client", beside("tail")))
    gains = comparison.gains()
    reference = comparison.reference
    if gains and reference and len(gains) > 1:
        better = sum(gain > 0 for gain in gains.values())
        share = f"{better:,} of {len(gains):,}"
        than = _than(reference)
        found.append(Tile(share, f"clients do better {than}"))
    sent = run.summary.get("bytes", {})
    if sent.get("up") or sent.get("down"):
        up = words.size(sent.get("up", 0))
        down = words.size(sent.get("down", 0))
        found.append(Tile(up, "sent up in the whole run", f"down {down}"))
    seconds = run.summary.get("seconds", {})
    time = words.duration(seconds.get("total"))
    found.append(Tile(time, "wall time, from start to end"))
    return found


def _than(reference: Row) -> str:
    if reference.kind == "local":
        return "than training alone"
    if reference.kind == "base":
        return "than with the base"
    return f"than in {reference.note}"


def comparison_rows(run: Run, comparison: Comparison) -> list[dict[str, str]]:
    """mean, std, tail and worst client of every row, with the row's colour."""
    rows = [*comparison.rows, *unseen(run)]
    return [_comparison_row(row, run) for row in rows]


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
    parameters = run.summary.get("parameters", {})
    total = run.summary.get("bytes", {})
    meanings = (
        ("trained", "trained", "change while a client trains"),
        ("stored", "stored", "make up a client’s own model, beside the base that all share"),
        ("sent_up", "sent up", "leave a client in a round"),
        ("sent_down", "sent down", "reach a client in a round"),
    )
    rows = []
    for key, name, meaning in meanings:
        number = parameters.get(key)
        if number is not None:
            rows.append((f"parameters {name}", f"{number:,}", meaning))
    for way in ("up", "down"):
        key = f"bytes_{way}"
        each = [line[key] for line in run.trained if line.get(key) is not None]
        if each:
            size = words.size(median(each))
            rows.append((f"bytes {way} in a round", size, "one client, as encoded for the wire"))
    for way in ("up", "down"):
        if way in total:
            size = words.size(total[way])
            rows.append((f"bytes {way} in the run", size, "all clients and rounds together"))
    return rows


def time_rows(run: Run) -> list[tuple[str, str, float]]:
    """(what, duration, share of the total in percent); what is left over (loading, export) is a row
    of its own.
    """
    seconds = run.summary.get("seconds", {})
    total = seconds.get("total") or 0.0
    known: dict[str, float] = {}
    for key, name in (
        ("training", "local training"),
        ("evaluation", "evaluation"),
        ("server", "server"),
    ):
        value = seconds.get(key)
        if value is not None:
            known[name] = float(value)
    rest = total - sum(known.values())
    if rest > 0.005 * total:
        known["the rest: loading, writing"] = rest
    rows = []
    for name, value in known.items():
        share = 0.0
        if total:
            share = 100 * value / total
        rows.append((name, words.duration(value), share))
    whole = words.duration(total)
    return [*rows, ("total", whole, 100.0)]


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
        at = ""
        if "delta" in budget:
            at = f" at δ {budget['delta']:.2g}"
        known = ""
        if budget.get("randomness") == "seed":
            known = ", noise from the seed: an experiment"
        found.append(f"ε {budget['epsilon']:.3g}{at} {whom}{known}")
    if spent.get("secure_aggregation"):
        found.append("secure aggregation")
    return "; ".join(found) or None


def _local_work(run: Run) -> str | None:
    epochs = run.setting("train", "local_epochs")
    steps = run.setting("train", "local_steps")
    if epochs:
        return words.count(epochs, "epoch")
    if steps:
        return words.count(steps, "step")
    return None
