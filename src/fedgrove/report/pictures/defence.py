"""``defence.json``: whose changes were cut, round by round, and what attackers came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedgrove.ground import words
from fedgrove.ground.plain import Given
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS

FILE = "defence.json"
_KEPT = LinearSegmentedColormap.from_list("kept", ["#00538a", "#8fc1e3", "#f1f1ee"])
_MOST = 40  # clients with a row of their own: those that lost most
_ROW = 0.22  # inches


def defence(left: Left) -> list[Section]:
    """Who was cut, where the job had a defence; and how the attack went, where it had one."""
    if not left.has(FILE):
        return []
    content = left.read(FILE)
    sections = []
    attack = content.get("attack", {})
    if attack:
        sections.append(Section("The attack", _attack_story(attack)))
    kept = _kept(content["lines"])
    if kept:
        attackers = attack.get("attackers", [])
        shown = sorted(kept, key=lambda name: (_mean(kept[name]), name))[:_MOST]
        sections.append(
            Section(
                "Whose changes the defence cut",
                _cut_story(content["defence"]["rule"], kept, attackers),
                partial(_figure, {name: kept[name] for name in shown}, attackers),
            )
        )
    return sections


def _kept(lines: Sequence[Given]) -> dict[str, dict[int, float]]:
    """By client and round, the share of its change that had a say."""
    kept: dict[str, dict[int, float]] = {}
    for line in lines:
        share = line["scale"] * line.get("weight", 1.0)
        kept.setdefault(line["client"], {})[line["round"]] = share
    return kept


def _mean(rounds: Mapping[int, float]) -> float:
    return sum(rounds.values()) / len(rounds)


def _attack_story(attack: Given) -> str:
    who = words.count(len(attack["attackers"]), "client")
    text = f"{who} attacked ({attack['kind']}): {words.some(attack['attackers'], 8)}. "
    if attack["honest"] is not None:
        text += f"The honest clients’ mean is {100 * attack['honest']:.1f} %"
        text += "." if attack["success"] is None else ""
    if attack["success"] is not None:
        text += (
            f"; on {100 * attack['success']:.1f} % of the rows that tell, they answer what the "
            "attackers wanted."
        )
    return text


def _cut_story(rule: str, kept: Mapping[str, Mapping[int, float]], attackers: Sequence[str]) -> str:
    honest = [_mean(rounds) for name, rounds in kept.items() if name not in attackers]
    text = f"Each row is a client, each column a round ({rule}); dark: its change had no say. "
    if honest:
        text += f"Honest changes kept {100 * np.mean(honest):.0f} % of their say"
    hostile = [_mean(kept[name]) for name in attackers if name in kept]
    if hostile:
        text += f", attackers’ {100 * np.mean(hostile):.0f} %"
    text += "."
    if len(kept) > _MOST:
        text += f" Shown are the {_MOST} of {len(kept)} clients that lost most."
    return text


def _figure(
    kept: Mapping[str, Mapping[int, float]], attackers: Sequence[str], width: float
) -> Figure:
    rounds = sorted({number for each in kept.values() for number in each})
    grid: NDArray[np.float64] = np.full((len(kept), len(rounds)), np.nan)
    for row, each in enumerate(kept.values()):
        for number, share in each.items():
            grid[row, rounds.index(number)] = share
    figure = Figure(figsize=(width, 0.9 + _ROW * len(kept)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap=_KEPT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(kept)), [words.shorten(name, 22) for name in kept])
    for label, name in zip(axes.get_yticklabels(), kept, strict=True):
        if name in attackers:
            label.set_color(COLOURS["tail"])
            label.set_fontweight("bold")
    ticks = range(0, len(rounds), max(1, len(rounds) // 10))
    axes.set_xticks(list(ticks), [str(rounds[tick]) for tick in ticks])
    axes.set_xlabel("round")
    figure.colorbar(image, ax=axes, label="share of its say", shrink=0.9)
    return figure
