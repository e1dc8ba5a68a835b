"""HiLoRA's pictures: who stands where on the map, what each tier is said to add, and that odd
content draws too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from fedgrove.clustering.spectral import spectral
from fedgrove.report import sections, style, write_report
from fedgrove.report.pictures import clusters as picture
from fedgrove.report.sections import Left
from fedgrove.report.tiers import Tiers

from .conftest import MakeRun

TIERS = [
    {"tier": "root", "first": 1, "last": 2},
    {"tier": "cluster", "first": 3, "last": 4},
    {"tier": "leaf", "first": 5, "last": 6},
]


def content(clients: int = 6, groups: int = 2, **changes: Any) -> dict[str, Any]:
    """Clients that alternate between groups, so that their order on the map is not that of their
    names.
    """
    rng = np.random.default_rng(0)
    own = [number % groups for number in range(clients)]
    distances = np.where(np.equal.outer(own, own), 0.3, 0.8) + 0.05 * rng.random((clients, clients))
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    names = [f"site-{number:02d}" for number in range(clients)]
    return {
        "clients": names,
        "labels": own,
        "eigenvalues": spectral(distances).eigenvalues.tolist(),
        "distances": distances.tolist(),
        "sigma": 0.5,
        "basis": "B",
        "late": {},
        "tiers": TIERS,
        "steps": [None, 0.3],
        "layers": [0, 1, 2],
        "overlap": {
            "root-cluster": [[0.1, 0.2, 0.3]] * groups,
            "root-leaf": {name: [0.01, 0.02, 0.03] for name in names},
            "cluster-leaf": {name: [0.05, 0.05, 0.05] for name in names},
        },
        "chance": {"root-cluster": 0.02, "root-leaf": 0.02, "cluster-leaf": 0.02},
    } | changes


def write(folder: Path, found: dict[str, Any], rounds: int = 6, skip: tuple[int, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "clusters.json").write_text(json.dumps(found))
    (folder / "job.toml").write_text("[method]\nname = 'hilora'\ngamma_c = 0.1\ngamma_l = 0.25\n")
    lines = [
        {
            "round": round,
            "client": name,
            "split": "test",
            "loss": 1.0,
            "accuracy": round / 10 + 0.01 * place,
            "examples": 9,
        }
        for round in range(1, rounds + 1)
        if round not in skip
        for place, name in enumerate(found["clients"])
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def drawn(folder: Path, *beside: Path) -> list[sections.Section]:
    """The sections, each drawn for a page and for a phone."""
    with style.applied():
        found = picture.clusters(Left(folder, tuple(beside)))
        for each in found:
            for width in (style.WIDE, style.NARROW):
                if each.figure is not None:
                    assert callable(each.figure)
                    assert style.svg(each.figure(width), "x", each.title).startswith("<svg")
    return found


def test_the_map_is_ordered_by_cluster_with_a_frame_around_each() -> None:
    found = content(7, 3)
    with style.applied():
        figure = picture.heat(found, style.WIDE)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] != found["clients"][:3]
    order = [found["clients"].index(label.get_text()) for label in axes.get_yticklabels()]
    labels = [found["labels"][row] for row in order]
    assert labels == sorted(labels)
    frames = [line for line in axes.get_children() if isinstance(line, Line2D)]
    places = [np.asarray(frame.get_xdata(), dtype=float) for frame in frames]
    spans = [(place.min() + 0.5, place.max() + 0.5) for place in places]
    assert spans == [(0, 3), (3, 5), (5, 7)]
    alpha = np.asarray(axes.images[0].get_array())[..., 3]
    distances = np.array(found["distances"])[np.ix_(order, order)]
    off = ~np.eye(7, dtype=bool)
    assert np.all(alpha[~off] == 0)
    assert np.corrcoef(alpha[off], distances[off])[0, 1] < -0.9  # near is dark


def test_the_gap_that_was_chosen_is_marked() -> None:
    for groups in (2, 4, 9):
        found = content(20, groups)
        with style.applied():
            said = texts(picture.heat(found, style.WIDE))
        gap = found["eigenvalues"][groups] - found["eigenvalues"][groups - 1]
        assert f"gap {gap:.2g}\nafter {groups}" in said


def test_every_section_draws_and_says_what_it_shows(tmp_path: Path) -> None:
    found = drawn(write(tmp_path / "run", content(late={"site-99": 1})))
    assert [each.title for each in found] == [
        "Who is like whom: the clusters",
        "What each tier adds",
        "How far the tiers overlap",
    ]
    assert "6 clients into 2 clusters" in found[0].text
    assert "site-99 (cluster 1)" in found[0].text
    assert found[0].table[2] == ["1", "4", "site-01, site-03, site-05, site-99"]
    assert "γ_c = 0.1 towards the root, γ_l = 0.25" in found[2].text


def test_the_overlap_with_and_without_the_penalty_side_by_side(tmp_path: Path) -> None:
    run, other = (
        write(tmp_path / "run", content()),
        write(tmp_path / "other", content(overlap={"root-cluster": [[0.9] * 3]})),
    )
    (other / "job.toml").write_text("[method]\nname = 'hilora'\ngamma_c = 0.0\ngamma_l = 0.0\n")
    alone, both = drawn(run)[2], drawn(run, other)[2]
    assert "fedgrove report RUN --beside OTHER" in alone.text
    assert "--beside" not in both.text
    assert callable(both.figure)
    with style.applied():
        figure = both.figure(style.WIDE)
    assert [axes.get_title("left") for axes in figure.axes] == [
        "γ_c = 0.1, γ_l = 0.25",
        "without a penalty",
    ]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_ylim()[1] > 0.9


def test_what_a_tier_adds_is_read_at_its_last_evaluated_round(tmp_path: Path) -> None:
    found = content(4)
    tiers = Tiers.read(write(tmp_path / "run", found, skip=(4,)), found)
    assert tiers.names == ["root", "+ cluster", "+ leaf"]
    assert tiers.rounds == ["2", "3", "6"]
    assert tiers.means == pytest.approx([0.215, 0.315, 0.615])
    assert tiers.spreads == pytest.approx([0.01118] * 3, abs=1e-5)
    assert [row[0] for row in tiers.table()] == ["after", "root", "+ cluster", "+ leaf"]
    gone = Tiers.read(write(tmp_path / "run", found, skip=(3, 4)), found)
    assert gone.names == ["root", "+ leaf"]
    assert gone.missing == ["cluster"]
    assert "the end of cluster" in drawn(tmp_path / "run")[1].text


def test_newcomers_are_told_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", content())
    rows = {
        "site-00": {"metric": 0.9, "metric_tuned": None},
        "new-0": {"metric": 0.5, "metric_tuned": 0.7, "held_out": True},
        "new-1": {"metric": 0.6, "metric_tuned": 0.8, "held_out": True},
    }
    (folder / "summary.json").write_text(json.dumps({"clients": rows}))
    text = drawn(folder)[1].text
    assert (
        "2 clients that never trained: 55.0\u202f% with root and cluster alone, 75.0\u202f% after "
        "training a leaf" in text
    )


@pytest.mark.parametrize("clients", [1, 2, 3, 45])
def test_few_and_many_clients(clients: int, tmp_path: Path) -> None:
    found = drawn(write(tmp_path / "run", content(clients, min(clients, 2) if clients > 2 else 1)))
    assert (found[0].figure is None) == (clients < 3)
    if clients == 45:
        with style.applied():
            assert "45 clients, by cluster" in texts(picture.heat(content(45), style.NARROW))


def test_a_run_without_leaf_or_measures_still_shows_its_clusters(tmp_path: Path) -> None:
    bare = content(tiers=TIERS[:1], overlap={"root-cluster": [None, None]})
    found = drawn(write(tmp_path / "run", bare, rounds=0))
    assert [each.title for each in found] == ["Who is like whom: the clusters"]


def test_the_report_of_a_run_has_the_pictures(make_run: MakeRun) -> None:
    folder = make_run("hilora", clients=6, method="hilora")
    names = list(json.loads((folder / "summary.json").read_text())["clients"])
    found = content(6)
    (folder / "clusters.json").write_text(json.dumps(found | {"clients": names}))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Who is like whom: the clusters" in page
    assert "could not be shown" not in page
