"""grove's pictures: they draw whatever grove.json says, for few clients and for many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from fedgrove.clustering.tree import layer_cuts, merge_tree
from fedgrove.report import sections, style
from fedgrove.report.branches import Tree
from fedgrove.report.pictures import grove as picture
from fedgrove.report.sections import Left


def content(clients: int) -> dict[str, Any]:
    """Paths of so many clients that part in the deeper layers, with mixed budgets."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(clients, 3)) + 4 * rng.integers(0, 3, (clients, 1))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    merges = merge_tree(distances)
    names = [f"site-{number:03}" for number in range(clients)]
    layers = []
    for cut in layer_cuts(merges, [distances] * 4, 0.1, 3):
        groups: list[list[str]] = [[] for _ in range(cut.count)]
        for name, label in zip(names, cut.labels.tolist(), strict=True):
            groups[label].append(name)
        layers.append(
            {"layer": cut.layer, "count": cut.count, "score": cut.score, "groups": groups}
        )
    trained = {
        name: [n % 4 + 1] * (2 + 2 * (n % 2)) + [0] * (2 - 2 * (n % 2))
        for n, name in enumerate(names)
    }
    return {
        "clients": names,
        "joined": [],
        "merges": merges.tolist(),
        "grown": 2,
        "modules": {"root": 2, "branch": 2},
        "layers": layers,
        "trained": trained,
    }


def made(folder: Path, what: dict[str, Any]) -> list[sections.Section]:
    (folder / "grove.json").write_text(json.dumps(what), encoding="utf-8")
    return picture.grove(Left(folder))


@pytest.mark.parametrize("clients", [4, 16, 200])
@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
def test_it_draws(clients: int, width: float, tmp_path: Path) -> None:
    paths, budgets = made(tmp_path, content(clients))
    for section in (paths, budgets):
        assert callable(section.figure)
        with style.applied():
            figure = section.figure(width)
        assert figure.get_figwidth() == width
        assert figure.get_figheight() < 14
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert {"root", "branch"} <= set(texts)
    assert ("site-000" in texts) == (clients <= 16)


def test_the_shades_are_the_trainings() -> None:
    what = content(6)
    tree = Tree.read(what)
    budgets = picture.Budgets(2, 2, what["trained"])
    values = budgets.matrix(tree.columns)
    for column, name in enumerate(tree.columns):
        assert values[:, column].tolist() == what["trained"][name]
    assert picture.Budgets(1, 1, {}).matrix(["nobody"]).tolist() == [[0], [0]]


def test_a_grove_that_did_not_split_says_so(tmp_path: Path) -> None:
    what = content(4)
    for layer in what["layers"]:
        layer |= {"count": 1, "groups": [what["clients"]]}
    paths, _ = made(tmp_path, what)
    assert "no split passed the test" in paths.text


def test_nothing_is_shown_before_it_grows(tmp_path: Path) -> None:
    assert picture.grove(Left(tmp_path)) == []
