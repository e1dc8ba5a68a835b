"""The study's pictures, drawn from the cached runs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study import effects
from study.results import FieldResult, layers_of, scores

#: safe for colour-blind readers (after Okabe & Ito 2008)
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
SHOWN = 8  # methods in one picture; ablations have the tables


def draw(result: FieldResult, folder: Path) -> list[Path]:
    """Every picture for which there are runs."""
    makers: dict[str, Callable[[FieldResult], Figure | None]] = {
        "bytes": lambda found: curve(found, "bytes"),
        "steps": lambda found: curve(found, "steps"),
        "ceilings": ceilings,
        "tail": tail,
        "tree": tree,
        "tiers": tiers,
        "budgets": budgets,
    }
    written = []
    for name, make in makers.items():
        figure = make(result)
        path = folder / f"{result.field.name}-{name}.png"
        if figure is not None:
            figure.savefig(path, dpi=110)
            written.append(path)
    return written


def _axes(title: str, width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _main(result: FieldResult) -> list[str]:
    """The methods that a picture has room for; ablations stay in the tables."""
    return [method for method in result.runs if method not in ("base", "pooled")][:SHOWN]


def curve(result: FieldResult, over: str) -> Figure | None:
    """The measure over megabytes sent, or over local steps of a client, mean over seeds."""
    methods = _main(result)
    if not methods:
        return None
    figure, axes = _axes(f"{result.field.title}: {result.field.metric}")
    for colour, method in zip(PALETTE, methods, strict=False):
        x, y = _curve(result, method, over)
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=method)
    for name, style in (("base", ":"), ("pooled", "--")):
        if result.scores(name):
            level = effects.mean(result.scores(name))
            axes.axhline(level, color="#666666", linestyle=style, linewidth=1, label=name)
    axes.set_xlabel("MB sent, up and down" if over == "bytes" else "local steps of a client")
    axes.set_ylabel(result.field.metric)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _curve(result: FieldResult, method: str, over: str) -> tuple[list[float], list[float]]:
    runs = list(result.runs[method].values())
    numbers = sorted(map(int, runs[0].rounds))
    x, y = [], []
    for number in numbers:
        spent = [
            sum(value for key, value in getattr(run, over).items() if int(key) <= number)
            for run in runs
        ]
        clients = len(runs[0].rounds[str(number)])
        x.append(float(np.mean(spent)) / (1e6 if over == "bytes" else clients))
        each = [
            values[result.field.metric]
            for run in runs
            for values in run.rounds.get(str(number), {}).values()
        ]
        y.append(float(np.mean(each)))
    return x, y


def ceilings(result: FieldResult) -> Figure | None:
    """Base, training alone, one adapter for all, the true groups, everything in one place."""
    names = [name for name in ("base", "local", "fedit", "oracle", "pooled") if name in result.runs]
    if len(names) < 3:
        return None
    figure, axes = _axes(f"{result.field.title}: what there is to win", height=2.8)
    levels = [effects.mean(result.scores(name)) for name in names]
    axes.barh(names[::-1], levels[::-1], color="#0072B2", alpha=0.8)
    for place, level in enumerate(levels[::-1]):
        axes.annotate(f" {level:.3f}", (level, place), va="center", fontsize=8)
    axes.set_xlabel(result.field.metric)
    return figure


def tail(result: FieldResult) -> Figure | None:
    """All clients of all seeds, from the worst to the best."""
    methods = _main(result)
    if not methods:
        return None
    figure, axes = _axes(f"{result.field.title}: clients from worst to best")
    for colour, method in zip(PALETTE, methods, strict=False):
        values = [each for seed in result.scores(method).values() for each in seed.values()]
        ordered = sorted(values, reverse=not result.field.higher)
        axes.plot(np.linspace(0, 1, len(ordered)), ordered, color=colour, label=method)
    axes.axvline(0.1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of clients")
    axes.set_ylabel(result.field.metric)
    axes.legend(fontsize=7, frameon=False)
    return figure


def tree(result: FieldResult) -> Figure | None:
    """The groups that methods found, layer by layer, beside the true ones; first seed."""
    found: dict[str, list[list[list[str]]]] = {}
    for method, runs in result.runs.items():
        layers = layers_of(runs[min(runs)])
        if layers is not None and len(found) < 3:
            found[method] = layers
    if not found:
        return None
    names = sorted({name for layers in found.values() for group in layers[0] for name in group})
    depth = max(len(layers) for layers in found.values())
    truth = [result.truth(layer, [names]) for layer in range(depth)]
    panels: dict[str, list[dict[str, int]]] = {"true": truth}
    for method, layers in found.items():
        numbered = [
            {name: number for number, group in enumerate(groups) for name in group}
            for groups in layers
        ]
        panels[method] = numbered * (depth // len(numbered) if len(numbered) == 1 else 1)
    figure = Figure(figsize=(3.0 * len(panels), 0.22 * len(names) + 1.0), layout="constrained")
    for axes, (title, layers_) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        matrix = np.array([[layer.get(name, -1) for layer in layers_] for name in names])
        axes.imshow(matrix, cmap="tab10", vmin=0, vmax=9, aspect="auto")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("layer", fontsize=8)
        axes.set_xticks(range(depth))
        axes.set_yticks(range(len(names)), names if title == "true" else [], fontsize=6)
    return figure


def tiers(result: FieldResult) -> Figure | None:
    """The measure after each evaluated round of HiLoRA's runs: the ends of its tiers among them."""
    methods = [method for method in result.runs if method.startswith("hilora")]
    if not methods:
        return None
    figure, axes = _axes(f"{result.field.title}: HiLoRA's tiers")
    for colour, method in zip(PALETTE, methods, strict=False):
        runs = list(result.runs[method].values())
        numbers = sorted(map(int, runs[0].rounds))
        levels = [
            np.mean([v[result.field.metric] for run in runs for v in run.rounds[str(n)].values()])
            for n in numbers
        ]
        axes.plot(numbers, levels, marker="o", markersize=4, color=colour, label=method)
    axes.set_xlabel("round")
    axes.set_ylabel(result.field.metric)
    axes.legend(fontsize=7, frameon=False)
    return figure


def budgets(result: FieldResult) -> Figure | None:
    """What a client gains over training alone, by its rank; fields with mixed ranks only."""
    alone = result.runs.get("local")
    if alone is None:
        return None
    ranks = {_rank(row) for record in alone.values() for row in record.clients.values()}
    if len(ranks) < 2:
        return None
    figure, axes = _axes(f"{result.field.title}: gain over training alone by budget")
    for colour, method in zip(PALETTE, _main(result), strict=False):
        if method == "local":
            continue
        gains: dict[int, list[float]] = {}
        for seed, record in result.runs[method].items():
            if seed in alone:
                _gains(result, record, alone[seed], gains)
        known = sorted(gains)
        axes.plot(
            known, [np.mean(gains[rank]) for rank in known], marker="o", color=colour, label=method
        )
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank of the client's budget")
    axes.set_ylabel(f"{result.field.metric} better by")
    axes.legend(fontsize=7, frameon=False)
    return figure


def _gains(result: FieldResult, record: Any, alone: Any, gains: dict[int, list[float]]) -> None:
    sign = 1 if result.field.higher else -1
    ours, other = scores(record, result.field), scores(alone, result.field)
    for client in sorted(set(ours) & set(other)):
        rank = _rank(alone.clients[client])
        gains.setdefault(rank, []).append(sign * (ours[client] - other[client]))


def _rank(row: dict[str, Any]) -> int:
    return int(row.get("rank") or 0)
