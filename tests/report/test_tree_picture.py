"""FedTreeLoRA's picture: the geometry of trunk and branches, the words, and that it draws whatever
tree.json says.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.text import Text

from fedgrove.clustering.tree import layer_cuts, merge_tree
from fedgrove.report import sections, style, write_report
from fedgrove.report.branches import Tree
from fedgrove.report.pictures import tree as picture
from fedgrove.report.sections import Left

from .conftest import MakeRun


def content(counts: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """Six clients; layers 0 and 1 are shared, then {a, b, c} parts from {d, e, f}, then f from
    those.
    """
    groups = {1: ["abcdef"], 2: ["abc", "def"], 3: ["abc", "de", "f"], 6: list("abcdef")}
    layers: list[dict[str, Any]] = [
        {
            "layer": place,
            "count": count,
            "score": 0.1 * (place + 1),
            "groups": [list(group) for group in groups[count]],
        }
        for place, count in enumerate(counts or [1, 1, 2, 3])
    ]
    merges = [[3, 4, 1.0, 2], [0, 1, 1.5, 2], [2, 7, 2.0, 3], [5, 6, 4.0, 3], [8, 9, 9.0, 6]]
    shares = {
        str(row["layer"]): dict.fromkeys("abcdef", 0.4 + 0.05 * row["layer"]) for row in layers[2:]
    }
    return {
        "clients": list("abcdef"),
        "merges": merges,
        "joined": [],
        "layers": layers,
        "lambda": shares,
    } | changes


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def made(run_dir: Path, what: dict[str, Any]) -> list[sections.Section]:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "tree.json").write_text(json.dumps(what))
    return picture.tree(Left(run_dir))


def test_clients_stand_as_the_dendrogram_has_them() -> None:
    tree = Tree.read(content())
    assert tree.columns == ["a", "b", "c", "d", "e", "f"]
    assert tree.births == [None, None, 2, None, 3]
    late = content(joined=["x"])
    for layer, group in zip(late["layers"], (0, 0, 0, 0), strict=True):
        layer["groups"][group].append("x")
    assert Tree.read(late).columns == ["a", "b", "c", "x", "d", "e", "f"]


def test_the_trunk_is_one_piece_and_branches_open_where_they_part() -> None:
    tree = Tree.read(content())
    trunk, deepest = tree.centres(0.0), tree.centres()
    assert np.diff(trunk).tolist() == pytest.approx([1.0] * 5)
    gaps = np.diff(deepest) - 1
    assert gaps[[0, 1, 3]].tolist() == pytest.approx([0, 0, 0])
    assert gaps[2] > gaps[4] > 0.2  # the older, the wider
    assert np.diff(tree.centres(2.0)).tolist() == pytest.approx([1.0] * 5)  # parting has only begun
    openings = [np.diff(tree.centres(depth))[2] for depth in np.linspace(2, 4, 20)]
    assert all(before <= after for before, after in pairwise(openings))
    assert tree.width == pytest.approx(6 + gaps.sum())
    assert deepest[0] == pytest.approx(-tree.width / 2 + 0.5)


def test_a_band_joins_the_band_it_splits_from_without_overlap() -> None:
    tree = Tree.read(content([1, 2, 2, 6]))
    lives = {group: (start, end) for group, start, end in tree.lives()}
    assert lives[frozenset("abc")] == (1, 3)
    assert lives[frozenset("a")] == (3, 4)
    for group, (start, end) in lives.items():
        corners = tree.outline(group, start, end)
        half = len(corners) // 2
        left, right = corners[:half], corners[half:][::-1]
        assert (right[:, 0] - left[:, 0]).tolist() == pytest.approx([len(group)] * half)
        parents = [other for other, (_, ends) in lives.items() if ends == start and group < other]
        assert len(parents) == (start > 0)
        for parent in parents:
            edge = tree.outline(parent, *lives[parent])
            above = [x for x, depth in edge if depth == start]
            assert min(above) - 1e-9 <= left[0, 0]
            assert right[0, 0] <= max(above) + 1e-9


def test_colours_go_from_wood_to_one_for_each_deepest_group() -> None:
    tree = Tree.read(content())
    branches = [tree.colour(group) for group in ("abc", "de", "f")]
    assert len(set(branches)) == 3
    assert np.ptp(tree.colour("abcdef")) < 0.15 < min(np.ptp(colour) for colour in branches)
    many = {
        "clients": [str(n) for n in range(12)],
        "merges": merge_tree(np.ones((12, 12)) - np.eye(12)).tolist(),
    }
    tree = Tree.read(
        {**many, "layers": [{"layer": 0, "score": 0.0, "groups": [[str(n)] for n in range(12)]}]}
    )
    assert len({tree.colour([str(n)]) for n in range(12)}) == 12


def test_the_figure_shows_layers_groups_cuts_and_names() -> None:
    tree = Tree.read(content())
    with style.applied():
        figure = picture.grown(tree, style.WIDE)
    said = words(figure)
    for text in (
        "1 group",
        "2 groups",
        "3 groups",
        "layers 0–1",
        "layer 2",
        "layer 3",
        *"abcdef",
        "0",
        "3",
    ):
        assert text in said, text
    branches, dendrogram = figure.axes
    bands = [patch for patch in branches.patches if isinstance(patch, Polygon)]
    assert len(bands) == 6  # root, trunk, abc, def, de, f
    low, high = branches.get_ylim()
    assert low > high  # layers go down
    dashed = [line for line in dendrogram.lines if line.is_dashed()]
    cuts = sorted(float(np.asarray(line.get_ydata())[0]) for line in dashed)
    assert cuts[0] == pytest.approx(
        (2.0 + 4.0) / 2
    )  # three groups: between the merges that make three and two
    assert cuts[1] == pytest.approx((4.0 + 9.0) / 2)
    assert cuts[2] > 9.0


def test_lambda_is_a_map_over_the_same_clients_where_layers_are_split() -> None:
    tree = Tree.read(content())
    with style.applied():
        figure = picture.reliance(tree, style.WIDE)
    columns = [mesh for mesh in figure.axes[0].collections if isinstance(mesh, QuadMesh)]
    assert len(columns) == 6
    values: Any = np.stack(
        [np.ma.filled(np.ma.asarray(mesh.get_array()), np.nan).ravel() for mesh in columns]
    )
    assert np.isnan(values[:, :2]).all()
    assert values[:, 2].tolist() == pytest.approx([0.5] * 6)
    assert values[:, 3].tolist() == pytest.approx([0.55] * 6)
    assert "shared by all" in words(figure)


def test_what_is_said(tmp_path: Path) -> None:
    first, second = made(tmp_path / "run", content())
    assert first.text.startswith("All 6 clients share layers 0–1. The deepest layer has 3 groups.")
    assert list(first.table) == [
        ["who shares", "layers", "groups", "score"],
        ["everyone", "0–1", "1", "0.10 to 0.20"],
        ["a, b, c · d, e, f", "2", "2", "0.30"],
        ["a, b, c · d, e · f", "3", "3", "0.40"],
    ]
    assert "λ" in second.title
    (alone,) = made(tmp_path / "run", content([1, 1, 1, 1], **{"lambda": {}}))
    assert alone.text.startswith("No layer splits: all 6 clients share everything.")
    (branched,) = made(tmp_path / "run", content([2, 3, 3, 3], **{"lambda": {}}))
    assert branched.text.startswith(
        "No layer is shared by all clients. The deepest layer has 3 groups."
    )


def test_without_one_tree_rows_stand_for_themselves(tmp_path: Path) -> None:
    crossed = content([1, 2, 2, 3])
    crossed["layers"][2]["groups"] = [["a", "d"], ["b", "c", "e", "f"]]
    first, *_ = made(tmp_path / "run", crossed)
    assert "clustered alone" in first.text
    tree = Tree.read(crossed)
    assert not tree.nested
    with style.applied():
        figure = picture.grown(tree, style.WIDE)
    assert not [patch for patch in figure.axes[0].patches if isinstance(patch, Polygon)]
    assert not any("layer " in text for text in words(figure) if text != "layer, shallow to deep")


@pytest.mark.parametrize(("clients", "layers"), [(1, 1), (2, 3), (16, 6), (20, 24), (130, 12)])
@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
def test_it_draws_for_any_number_of_clients_and_layers(
    clients: int, layers: int, width: float
) -> None:
    rng = np.random.default_rng(clients)
    distances = []
    for layer in range(layers):
        points = rng.normal(0, 1, (clients, 3)) + layer * (np.arange(clients)[:, None] % 3)
        distances.append(np.linalg.norm(points[:, None] - points[None], axis=2))
    names = [f"client with a rather long name {n}" if n == 0 else f"c{n}" for n in range(clients)]
    merges = merge_tree(np.mean(distances, axis=0))
    cuts: list[dict[str, Any]] = [
        {
            "layer": cut.layer,
            "count": cut.count,
            "score": cut.score,
            "groups": [
                [names[i] for i in np.flatnonzero(cut.labels == g)] for g in range(cut.count)
            ],
        }
        for cut in layer_cuts(merges, distances, 0.1, 3)
    ]
    shares = {str(cut["layer"]): dict.fromkeys(names, 0.7) for cut in cuts}
    tree = Tree.read(
        {"clients": names, "merges": merges.tolist(), "layers": cuts, "lambda": shares}
    )
    with style.applied():
        figures = [picture.grown(tree, width)]
        if any(cut["count"] > 1 for cut in cuts):
            figures.append(picture.reliance(tree, width))
        for figure in figures:
            page = style.svg(figure, "tree", "The tree")
            named = clients <= 20 and (width == style.WIDE or clients <= 16)
            assert ("c1<" in page) == (named and clients > 1)
            assert len(page) < 400_000
            assert all(
                box.y0 > -1
                for box in (axes.get_tightbbox() for axes in figure.axes)
                if box is not None
            )


def test_the_report_shows_it_and_stands_without_it(make_run: MakeRun) -> None:
    path = make_run("run", clients=2, rounds=1, method="fedtreelora")
    (path / "tree.json").write_text(json.dumps(content()))
    page = write_report(path).read_text(encoding="utf-8")
    assert "who shares with whom, layer by layer" in page
    assert (path / "figures" / "extra-1.png").exists()
    (path / "tree.json").write_text("{}")
    page = write_report(path).read_text(encoding="utf-8")
    assert "pictures.tree:tree draws could not be shown" in page
