"""``POOL/pool.html``: who answers for whom, how near members are, what it is worth, and why single
inputs went where they went; from the files of the pool alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from fedgrove.ground import files, words
from fedgrove.ground.plain import Plain
from fedgrove.interop import peft
from fedgrove.pools.against import FILE, MASKED, noted
from fedgrove.pools.pool import Pool
from fedgrove.report import style
from fedgrove.report.painter import Painter
from fedgrove.report.render import render
from fedgrove.report.sections import Section

PAGE = "pool.html"
LATEST = 20  # inputs asked about with --why that the page shows
NAMES = 30  # above this, members have no name on an axis
_WEIGHT = LinearSegmentedColormap.from_list("weight", ["#f1f1ee", "#8fc1e3", "#00538a"])
_WORDS = {
    "pool": "the pool",
    MASKED: "the pool, own member masked",
    "own": "each owner's own adapter",
    "uniform": "all members alike",
    "best": "the best single member, in hindsight",
    "base": "the base, read by the mean head",
}


def write_page(pool: Pool, folder: Path) -> Path:
    """Write the page anew."""
    painter = Painter(folder / "figures")
    shown = [section for section in sections(pool, folder) if section is not None]
    painted = [
        painter.shown(f"pool-{number}", section) for number, section in enumerate(shown, start=1)
    ]
    page = render(
        "sections.html",
        headline=f"A pool of {words.count(len(pool.members), 'adapter')}",
        facts=_facts(pool),
        sections=painted,
        notes=painter.failed,
        name=folder.name,
    )
    files.write_text(folder / PAGE, page)
    return folder / PAGE


def sections(pool: Pool, folder: Path) -> list[Section | None]:
    """What there is to show."""
    found: Plain = {}
    if (folder / FILE).exists():
        found = peft.read_json(folder / FILE)
    return [
        _worth(found),
        _who(found),
        _map(pool),
        _even(found),
        _why(folder),
        _table(pool),
    ]


def _facts(pool: Pool) -> list[tuple[str, str]]:
    plan = pool.plan
    told = [("router", plan.router), ("adds up by", plan.compose), ("base", pool.members[0].base)]
    if plan.router != "uniform":
        told.append(("members to an input", str(plan.top_k)))
    return told


# ---------------------------------------------------------------------- sections
def _worth(found: Plain) -> Section | None:
    if not found:
        return None
    text = f"{found['metric']} on the test rows of each owner: a dot for each, the dark bar their mean. "
    if found["best"]:
        text += f"The best single member is {found['best']}, chosen on these very rows. "
    text += "Where the pool lies left of all members alike, the router does not earn its place."
    return Section("What it is worth", text, partial(worth, found))


def _who(found: Plain) -> Section | None:
    if not found or len(next(iter(found["shares"].values()))) < 2:
        return None
    return Section(
        "Who answers for whom",
        "Each row is an owner's test rows, each column a member: the darker, the more of the answers "
        "comes from it. A dark diagonal means that the router finds the owner.",
        partial(who, found["shares"]),
    )


def _map(pool: Pool) -> Section | None:
    signed = {each.name: each.signature.mean for each in pool.members if each.signature}
    if len(signed) < 3:
        return None
    return Section(
        "A map of the members",
        "Members by the mean features of their signatures, in the plane in which these differ most. "
        "What lies together, the router can hardly tell apart.",
        partial(plane, signed),
    )


def _even(found: Plain) -> Section | None:
    if not found or len(found["entropy"]) < 2:
        return None
    return Section(
        "How sharply each layer chooses",
        "The entropy of a token's weights: 1 is all members alike, 0 one member alone.",
        partial(even, found["entropy"]),
    )


def _why(folder: Path) -> Section | None:
    asked = noted(folder, LATEST)
    if not asked:
        return None
    told = [[words.shorten(str(line["asked"]), 80), *reasons(line)] for line in reversed(asked)]
    rows = [["asked", "answered by", "compared"], *told]
    return Section(
        "Why an input went where it went",
        "The last inputs that were asked about with --why: what each member has of the answer, and "
        "the scores that this was decided by, the highest first.",
        table=rows,
        prose=True,
    )


def reasons(line: Mapping[str, Any], most: int = 4) -> list[str]:
    """An input's weights and scores in words, the largest first; a dash where there are none."""
    weights = _largest(line["weights"], most)
    shown = ", ".join(f"{name} {value:.2f}" for name, value in weights if value > 0)
    scores = _largest(line.get("scores", {}), most)
    return [shown, ", ".join(f"{name} {value:.3f}" for name, value in scores) or words.MISSING]


def _largest(values: Mapping[str, float], most: int) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda each: -each[1])[:most]


def _table(pool: Pool) -> Section:
    rows = [["member", "rank", "signature"]]
    for each in pool.members:
        told = words.MISSING
        if each.signature is not None:
            told = each.signature.words()
        rows.append([each.name, str(each.rank), told])
    return Section("The members", table=rows, prose=True)


# ----------------------------------------------------------------------- figures
def worth(found: Plain, width: float) -> Figure:
    """A line of dots for the pool and each of its rivals."""
    shown = [name for name in _WORDS if name in found["measures"]]
    figure, axes = style.new_figure(width, 0.8 + 0.45 * len(shown))
    values = {
        name: [float(each[found["metric"]]) for each in found["measures"][name].values()]
        for name in shown
    }
    for place, name in enumerate(shown):
        role = "ours" if name in ("pool", MASKED) else "base"
        colour = style.COLOURS[role]
        axes.scatter(
            values[name],
            [place] * len(values[name]),
            s=26,
            color=colour,
            alpha=0.55,
            lw=0,
        )
        axes.plot([fmean(values[name])] * 2, [place - 0.3, place + 0.3], color=style.COLOURS["ink"])
    axes.set_yticks(range(len(shown)), [_WORDS[name] for name in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel(found["metric"])
    return figure


def who(shares: Mapping[str, Mapping[str, float]], width: float) -> Figure:
    """Owners by members."""
    members = list(next(iter(shares.values())))
    values = np.array([[row[name] for name in members] for row in shares.values()])
    figure, axes = style.new_figure(width, 1.6 + min(7.0, 0.3 * len(values)))
    image = axes.pcolormesh(
        values, cmap=_WEIGHT, vmin=0, vmax=max(float(values.max()), 1e-9),
        edgecolors=style.COLOURS["paper"], linewidth=0.6,
    )  # fmt: skip
    axes.invert_yaxis()
    _name(
        axes.set_xticks,
        members,
        rotation=60,
        ha="right",
        rotation_mode="anchor",
    )
    _name(axes.set_yticks, list(shares))
    axes.set_xlabel("members")
    axes.set_ylabel("whose rows")
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(
        image,
        ax=axes,
        shrink=0.6,
        label="mean weight",
        drawedges=False,
    )
    return figure


def _name(
    ticks: Any,
    names: Sequence[str],
    **look: Any,
) -> None:
    if len(names) > NAMES:
        ticks([])
        return
    ticks(
        [index + 0.5 for index in range(len(names))],
        [words.shorten(n, 20) for n in names],
        **look,
    )


def plane(means: Mapping[str, Tensor], width: float) -> Figure:
    """The first two principal components of mean features [h] of each member."""
    table = torch.stack([each.double() for each in means.values()])
    centred = table - table.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    places = (u * s)[:, :2].numpy()
    share = (s.square() / s.square().sum().clamp_min(1e-30))[:2].tolist()
    figure, axes = style.new_figure(width, style.fitting(width, 5.2, 4.2))
    axes.scatter(
        places[:, 0],
        places[:, 1],
        s=40,
        color=style.COLOURS["ours"],
        lw=0,
    )
    if len(means) <= NAMES:
        for name, (x, y) in zip(means, places, strict=True):
            axes.annotate(
                words.shorten(name, 20),
                (x, y),
                (5, 4),
                textcoords="offset points",
                fontsize=10,
            )
    axes.margins(0.15)
    axes.set_xlabel(f"first direction ({100 * share[0]:.0f} % of the spread)")
    axes.set_ylabel(f"second ({100 * share[1]:.0f} %)")
    return figure


def even(entropy: Mapping[str, float], width: float) -> Figure:
    """A line over layers."""
    figure, axes = style.new_figure(width, 2.8)
    layers = [int(layer) for layer in entropy]
    axes.plot(
        layers,
        list(entropy.values()),
        color=style.COLOURS["ours"],
        marker="o",
        markersize=4,
    )
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y")
    axes.set_xlabel("layer")
    axes.set_ylabel("entropy, of that of all alike")
    return figure
