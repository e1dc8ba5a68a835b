"""A pool beside what it has to beat, on everybody's rows: each owner's own adapter, the base alone,
all members alike, and the best single member.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fedgrove.federation.readers import Row
from fedgrove.ground import lines
from fedgrove.ground.errors import RunError
from fedgrove.ground.files import write_json
from fedgrove.ground.plain import Plain
from fedgrove.pools.pool import Pool, Routes
from fedgrove.use.result import Result

if TYPE_CHECKING:
    from fedgrove.use.personal import ClientModel

RIVALS = ("own", "base", "uniform", "best")
MASKED = "masked"  # the pool without the owner's own member
FILE, ROUTES = "evaluation.json", "routes.jsonl"
EVERYBODY = "everybody"  # whose rows a table's are
Rows = dict[str, list[Row]]


@dataclass
class Against:
    """Measures by who answers and whose rows: ``{"pool": {owner: measures}}``; what the owners' rows
    gave each member on average, and how evenly by layer.
    """

    metric: str
    measures: dict[str, dict[str, Plain]] = field(default_factory=dict)
    best: str | None = None  # the member that does best on all rows, in hindsight
    shares: dict[str, dict[str, float]] = field(default_factory=dict)  # owner -> member -> weight
    entropy: dict[str, float] = field(default_factory=dict)  # layer -> mean, 1: all alike

    def mean(self, who: str) -> float:
        """Over owners, of the task's metric."""
        return fmean(float(each[self.metric]) for each in self.measures[who].values())

    def plain(self) -> Plain:
        return {
            "metric": self.metric,
            "best": self.best,
            "measures": self.measures,
            "shares": self.shares,
            "entropy": self.entropy,
        }


def owners_rows(pool: Pool) -> Rows:
    """The test rows of the members that are clients of runs whose data lie here. Raises
    ``RunError`` where there are none.
    """
    found: Rows = {}
    results: dict[Path, Result] = {}
    for each in pool.members:
        run = each.place.run
        if run is None:
            continue
        if run not in results:
            results[run] = Result(run)
        found[each.name] = results[run].tests[each.name]
    if not found:
        raise RunError(
            "No member of the pool is a client of a run, so there are no test rows here; name a table "
            "with --data."
        )
    return found


def checked(rivals: Sequence[str]) -> list[str]:
    """What the pool is compared with. Raises ``RunError``."""
    for each in rivals:
        if each not in RIVALS:
            raise RunError(f"--against {each}: choose from {', '.join(RIVALS)}.")
    return list(dict.fromkeys(rivals))


def against(
    pool: Pool,
    rows: Mapping[str, Sequence[Row]],
    rivals: Sequence[str] = (),
    *,
    mask_own: bool = False,
    advance: Callable[[str], None] = lambda _: None,
) -> Against:
    """The pool and its rivals on each owner's rows. ``mask_own``: also the pool without the owner's
    member; ``advance`` hears what is done.
    """
    rivals = checked(rivals)
    owners = [name for name in rows if name in pool.names]
    if ("own" in rivals or mask_own) and len(owners) < len(rows):
        raise RunError(
            "--against own and --mask-own go by whose rows they are, which a table does not say; leave "
            "out --data."
        )
    if mask_own and len(pool.names) < 2:
        raise RunError("--mask-own leaves nobody in a pool of one member.")
    found = Against(pool.kernel.task.metric)
    found.measures["pool"] = _each(pool.model, rows)
    advance("pool")
    _look(pool, rows, found)
    if mask_own:
        found.measures[MASKED] = {}
        for name, own in rows.items():
            found.measures[MASKED][name] = pool.without(name).measures(own)
        advance(MASKED)
    if "own" in rivals:
        found.measures["own"] = {}
        for name, own in rows.items():
            found.measures["own"][name] = pool.member(name).measures(own)
        advance("own")
    if "base" in rivals:
        found.measures["base"] = _each(pool.base(), rows)
        advance("base")
    if "uniform" in rivals:
        way = None
        if pool.plan.compose == "ensemble":
            way = pool.plan.compose
        found.measures["uniform"] = _each(pool.like("uniform", way).model, rows)
        advance("uniform")
    if "best" in rivals:
        found.best = _best(pool, rows, found)
        advance("best")
    return found


def _each(model: ClientModel, rows: Mapping[str, Sequence[Row]]) -> dict[str, Plain]:
    return {name: model.measures(own) for name, own in rows.items()}


def _best(
    pool: Pool,
    rows: Mapping[str, Sequence[Row]],
    found: Against,
) -> str:
    """The member with the highest mean, whose measures become those of ``best``."""
    tried = {name: _each(pool.member(name), rows) for name in pool.names}
    means: dict[str, float] = {}
    for name, own in tried.items():
        values = [float(each[found.metric]) for each in own.values()]
        means[name] = fmean(values)
    best = max(means, key=lambda name: means[name])
    found.measures["best"] = tried[best]
    return best


def _look(
    pool: Pool,
    rows: Mapping[str, Sequence[Row]],
    found: Against,
) -> None:
    """Who answers for whom."""
    layers: dict[str, list[float]] = {}
    for name, own in rows.items():
        routes = pool.routes(own)
        means = routes.weights.mean(0).tolist()
        found.shares[name] = dict(zip(routes.names, means, strict=True))
        for layer, value in entropies(routes).items():
            layers.setdefault(layer, []).append(value)
    found.entropy = {layer: fmean(values) for layer, values in layers.items()}


def entropies(routes: Routes) -> dict[str, float]:
    """By layer, the mean entropy of an input's weights as a share of that of all alike; under "all"
    where every layer has the same.
    """
    if len(routes.names) == 1:
        return {}
    tables = {str(layer): each for layer, each in routes.layers.items()}
    if not tables:
        tables = {"all": routes.weights}
    found = {}
    for layer, weights in tables.items():
        own = -(weights * weights.clamp_min(1e-30).log()).sum(-1)
        found[layer] = float(own.mean()) / math.log(len(routes.names))
    return found


# ------------------------------------------------------------------------- files
def write(folder: Path, found: Against) -> Path:
    """``evaluation.json``, with None where a measure is not defined."""
    write_json(folder / FILE, found.plain())
    return folder / FILE


def note_routes(
    folder: Path,
    asked: Sequence[str],
    routes: Routes,
) -> None:
    """A line in ``routes.jsonl`` for each input that was asked about with ``--why``."""
    path = folder / ROUTES
    new = []
    for number, what in enumerate(asked):
        line: Plain = {"asked": what}
        line["weights"] = _named(routes, number)
        if routes.scores is not None:
            scores = routes.scores[number].tolist()
            line["scores"] = dict(zip(routes.names, scores, strict=True))
        if routes.layers:
            layers: Plain = {}
            for layer, each in routes.layers.items():
                weights = each[number].tolist()
                layers[str(layer)] = dict(zip(routes.names, weights, strict=True))
            line["layers"] = layers
        new.append(line)
    lines.append(path, *new)


def noted(folder: Path, last: int) -> list[Plain]:
    """The last inputs that were asked about with ``--why``, in their order."""
    path = folder / ROUTES
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line][-last:]
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); remove it.") from error


def _named(routes: Routes, number: int) -> dict[str, float]:
    weights = routes.weights[number].tolist()
    return dict(zip(routes.names, weights, strict=True))
