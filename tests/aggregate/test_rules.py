"""Every rule without groups against a dense float64 formula of its own: mixed ranks, mixed alphas,
unequal weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.aggregate.made import (
    SITES,
    Array,
    best,
    close,
    dense,
    many,
    products,
    read,
    total_noise,
    weighted,
    write,
)

from fedgrove.aggregate import aggregate, rules
from fedgrove.ground.errors import AdapterError

WEIGHTS = [120.0, 80.0, 45.5]
TEXT = "120,80,45.5"
MIXED = ([2, 5, 3], [4.0, 3.0, 12.0])  # ranks, alphas: scales 2, 0.6, 4
EVEN = ([3, 3, 3], [6.0, 6.0, 6.0])


def check_noise(out: Path, ideal: dict[str, Array]) -> None:
    """``noise.json`` says how far the written global adapter is from the ideal."""
    total, sites = total_noise(out)
    assert set(sites) == set(SITES)
    found = dense(out / "_global")
    for site, value in sites.items():
        size = float(np.linalg.norm(ideal[site]))
        assert value == pytest.approx(
            np.linalg.norm(found[site] - ideal[site]), rel=1e-9, abs=1e-12 * size
        )
    assert total == pytest.approx(np.sqrt(sum(value**2 for value in sites.values())), rel=1e-12)


def ideal_of(factors: Any, alphas: Any, weights: Any = WEIGHTS) -> dict[str, Array]:
    return {site: weighted(products(factors, alphas, site), weights) for site in SITES}


def test_fedit(tmp_path: Path) -> None:
    folders, factors = many(tmp_path, *EVEN)
    aggregate("fedit", folders, tmp_path / "out", weights=TEXT)
    for site, (a, b, scale) in read(tmp_path / "out" / "_global").items():
        close(a, weighted([each[site][0] for each in factors], WEIGHTS))
        close(b, weighted([each[site][1] for each in factors], WEIGHTS))
        assert scale == 2.0
    check_noise(tmp_path / "out", ideal_of(factors, EVEN[1]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "_global",
        "aggregate.json",
        "noise.json",
    ]


def test_uniform_without_weights(tmp_path: Path) -> None:
    folders, factors = many(tmp_path, *EVEN)
    aggregate("fedit", folders, tmp_path / "out")
    for site, (a, _, _) in read(tmp_path / "out" / "_global").items():
        close(a, np.mean([each[site][0] for each in factors], axis=0))


def folded(factors: Any, alphas: Any, scale: float) -> list[dict[str, tuple[Array, Array]]]:
    """B at one scale."""
    return [
        {site: (a, b * (alpha / a.shape[0] / scale)) for site, (a, b) in each.items()}
        for each, alpha in zip(factors, alphas, strict=True)
    ]


@pytest.mark.parametrize(
    "method", ["fedit", "fedex-lora", "fedsa-lora", "fedvlm", "lora-fair", "fedrot-lora"]
)
def test_rescale_is_the_same_as_folding_the_scale_into_b_by_hand(
    method: str, tmp_path: Path
) -> None:
    alphas = [6.0, 3.0, 12.0]
    folders, factors = many(tmp_path / "a", [3, 3, 3], alphas)
    by_hand = [
        write(tmp_path / "b" / f"c{number}", each, 6.0)
        for number, each in enumerate(folded(factors, alphas, 2.0))
    ]
    aggregate(method, folders, tmp_path / "one", options=["rescale=B"], weights=TEXT)
    aggregate(method, by_hand, tmp_path / "two", weights=TEXT)
    names = [path.name for path in (tmp_path / "two").iterdir() if path.is_dir()]
    assert names
    for name in names:
        for site, matrix in dense(tmp_path / "two" / name).items():
            close(dense(tmp_path / "one" / name)[site], matrix)
            alpha = 6.0 if name == "_global" else alphas[int(name[1:])]
            assert read(tmp_path / "one" / name)[site][2] == alpha / 3  # each at its own alpha


@pytest.mark.parametrize("method", ["fedsa-lora", "fedvlm"])
def test_one_factor_is_shared_and_the_other_stays(method: str, tmp_path: Path) -> None:
    folders, factors = many(tmp_path, *EVEN)
    done = aggregate(method, folders, tmp_path / "out", weights=TEXT)
    assert done.adapters == ("c0", "c1", "c2")
    assert total_noise(tmp_path / "out")[0] is None
    shared, kept = (0, 1) if method == "fedsa-lora" else (1, 0)
    for number, own in enumerate(factors):
        for site, (a, b, _) in read(tmp_path / "out" / f"c{number}").items():
            found = (a, b)
            assert np.array_equal(found[kept], own[site][kept])
            close(found[shared], weighted([each[site][shared] for each in factors], WEIGHTS))


def test_ffa_lora(tmp_path: Path) -> None:
    _, factors = many(tmp_path / "raw", *EVEN)
    same = [{site: (factors[0][site][0], each[site][1]) for site in each} for each in factors]
    folders = [write(tmp_path / f"c{number}", each, 6.0) for number, each in enumerate(same)]
    aggregate("ffa-lora", folders, tmp_path / "out", weights=TEXT)
    for site, (a, _, _) in read(tmp_path / "out" / "_global").items():
        assert np.array_equal(a, factors[0][site][0])
        close(dense(tmp_path / "out" / "_global")[site], ideal_of(same, EVEN[1])[site])
    assert total_noise(tmp_path / "out")[0] == 0.0
    one = dict(same[1])
    one["encoder.layer.1.attention.self.query"] = factors[1]["encoder.layer.1.attention.self.query"]
    write(tmp_path / "c1", one, 6.0)
    with pytest.raises(
        AdapterError, match=r"c1.adapter_model.*layer\.1.*query\.lora_A.*ffa-lora freezes A"
    ):
        aggregate("ffa-lora", folders, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_flora_stacks_and_is_exact(tmp_path: Path) -> None:
    folders, factors = many(tmp_path, [2, 3, 1], [4.0, 3.0, 12.0])
    aggregate("flora", folders, tmp_path / "out", weights=TEXT)
    for site, (a, b, scale) in read(tmp_path / "out" / "_global").items():
        assert a.shape[0] == 6
        assert scale == 1.0  # of the largest client
        assert np.array_equal(
            b, np.concatenate([each[site][1] for each in factors], 1)
        )  # A alone carries the weights
        close(scale * b @ a, ideal_of(factors, [4.0, 3.0, 12.0])[site])
    assert total_noise(tmp_path / "out")[0] == 0.0


def test_flora_is_compacted_only_where_it_is_larger_than_the_layer(tmp_path: Path) -> None:
    folders, factors = many(tmp_path, *MIXED)  # 10 modules, 7 inputs
    aggregate("flora", folders, tmp_path / "out", weights=TEXT)
    for site, (a, _, _) in read(tmp_path / "out" / "_global").items():
        assert a.shape[0] == 7
        close(dense(tmp_path / "out" / "_global")[site], ideal_of(factors, MIXED[1])[site])


@pytest.mark.parametrize("split", ["authors", "balanced"])
@pytest.mark.parametrize("rank", [None, 2, 7])
def test_flexlora(rank: int | None, split: str, tmp_path: Path) -> None:
    folders, factors = many(tmp_path, *MIXED)
    options = [f"split={split}"]
    aggregate("flexlora", folders, tmp_path / "out", weights=TEXT, rank=rank, options=options)
    ideal = ideal_of(factors, MIXED[1])
    for site in SITES:
        a, b, scale = read(tmp_path / "out" / "_global")[site]
        assert a.shape[0] == (rank or 5)
        close(scale * b @ a, best(ideal[site], rank or 5))
        lengths = np.ones(len(a))  # of the rows of A
        if split == "balanced":
            lengths = np.linalg.norm(b, axis=0)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), lengths, atol=1e-12)
        for number, (own, alpha) in enumerate(zip(*MIXED, strict=True)):
            a, b, scale = read(tmp_path / "out" / f"c{number}")[site]
            assert (a.shape[0], scale) == (own, alpha / own)
            close(scale * b @ a, best(ideal[site], own))
    check_noise(tmp_path / "out", ideal)
    if rank == 7:
        assert total_noise(tmp_path / "out")[0] == 0.0


def hetlora(factors: Any, alphas: Any, weights: Any) -> dict[str, Array]:
    scale = 0.6  # that of the largest client
    result = {}
    for site in SITES:
        a, b = np.zeros((5, SITES[site][1])), np.zeros((SITES[site][0], 5))
        for each, alpha, weight in zip(factors, alphas, weights, strict=True):
            r = each[site][0].shape[0]
            a[:r] += weight / sum(weights) * each[site][0]
            b[:, :r] += weight / sum(weights) * each[site][1] * (alpha / r / scale)
        result[site] = scale * np.stack([b[:, j, None] * a[None, j] for j in range(5)])  # by module
    return result


@pytest.mark.parametrize("variant", ["full", "reduced"])
def test_hetlora(variant: str, tmp_path: Path) -> None:
    folders, factors = many(tmp_path, *MIXED)
    done = aggregate(
        "hetlora",
        folders,
        tmp_path / "out",
        weights=TEXT,
        options=["rescale=B", f"variant={variant}"],
    )
    assert any("--weights was not used" in note for note in done.notes) == (variant == "full")
    norms = [
        np.sqrt(sum(np.linalg.norm(products([each], [alpha], site)[0]) ** 2 for site in SITES))
        for each, alpha in zip(factors, MIXED[1], strict=True)
    ]
    weights = norms if variant == "full" else WEIGHTS
    modules = hetlora(factors, MIXED[1], weights)
    for site in SITES:
        close(dense(tmp_path / "out" / "_global")[site], modules[site].sum(0))
        for number, own in enumerate(MIXED[0]):
            a, _, scale = read(tmp_path / "out" / f"c{number}")[site]
            assert (a.shape[0], scale) == (own, MIXED[1][number] / own)
            close(dense(tmp_path / "out" / f"c{number}")[site], modules[site][:own].sum(0))
    check_noise(tmp_path / "out", ideal_of(factors, MIXED[1], weights))


def test_hetlora_with_equal_norms_is_fedit(tmp_path: Path) -> None:
    _, factors = many(tmp_path / "raw", *EVEN)
    sizes = [np.sqrt(sum(np.linalg.norm(b @ a) ** 2 for a, b in each.values())) for each in factors]
    folders = [
        write(tmp_path / f"c{n}", {site: (a, b / size) for site, (a, b) in each.items()}, 6.0)
        for n, (each, size) in enumerate(zip(factors, sizes, strict=True))
    ]
    for method in ("hetlora", "fedit"):
        aggregate(method, folders, tmp_path / method)
    for site, matrix in dense(tmp_path / "fedit" / "_global").items():
        close(dense(tmp_path / "hetlora" / "_global")[site], matrix)


def test_hetlora_keeps_what_no_client_of_the_round_holds(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, [4, 4, 2], [8.0, 8.0, 4.0])
    aggregate("hetlora", folders, tmp_path / "one")
    aggregate("hetlora", [folders[2]], tmp_path / "two", previous=tmp_path / "one")
    for site, (a, b, scale) in read(tmp_path / "two" / "_global").items():
        old = read(tmp_path / "one" / "_global")[site]
        own = read(folders[2])[site]
        assert scale == 2.0
        assert np.array_equal(a, np.concatenate([own[0], old[0][2:]]))
        assert np.array_equal(b, np.concatenate([own[1], old[1][:, 2:]], 1))


@pytest.mark.parametrize("ranks", [[2, 2, 2], [3, 3, 3]])
def test_fedex_lora_holds_the_means_and_is_exact(ranks: list[int], tmp_path: Path) -> None:
    folders, factors = many(tmp_path, ranks, [6.0] * 3)
    aggregate("fedex-lora", folders, tmp_path / "out", weights=TEXT)
    for site, (a, _, _) in read(tmp_path / "out" / "_global").items():
        close(dense(tmp_path / "out" / "_global")[site], ideal_of(factors, [6.0] * 3)[site])
        assert a.shape[0] == min(7, 3 * ranks[0])
        if ranks[0] == 2:
            close(a[:2], weighted([each[site][0] for each in factors], WEIGHTS))
    assert total_noise(tmp_path / "out")[0] == 0.0


def test_lora_fair_without_steps_is_fedit_and_with_many_points_where_the_mean_does(
    tmp_path: Path,
) -> None:
    folders, factors = many(tmp_path, *EVEN)
    aggregate("fedit", folders, tmp_path / "fedit", weights=TEXT)
    aggregate("lora-fair", folders, tmp_path / "none", weights=TEXT, options=["max_steps=0"])
    options = ["lam=0.0", "tol=0.0", "lr=5.0", "max_steps=20000"]
    aggregate("lora-fair", folders, tmp_path / "fair", weights=TEXT, options=options)
    ideal = ideal_of(factors, EVEN[1])
    for site in SITES:
        means = dense(tmp_path / "fedit" / "_global")[site]
        close(dense(tmp_path / "none" / "_global")[site], means)
        a = read(tmp_path / "fair" / "_global")[site][0]
        close(a, read(tmp_path / "fedit" / "_global")[site][0])
        inside = ideal[site] @ np.linalg.pinv(a) @ a
        limit = np.linalg.norm(inside) / np.linalg.norm(ideal[site])
        found = dense(tmp_path / "fair" / "_global")[site]
        cosine = (found * ideal[site]).sum() / np.linalg.norm(found) / np.linalg.norm(ideal[site])
        assert (means * ideal[site]).sum() / np.linalg.norm(means) / np.linalg.norm(
            ideal[site]
        ) < limit
        assert cosine == pytest.approx(limit, abs=1e-3)
    check_noise(tmp_path / "fair", ideal)


def turned(a: Array, b: Array, old: Any, half: str, lam: float) -> tuple[Array, Array]:
    matrix = old[0] @ a.T if half == "A" else old[1].T @ b

    def rotation(x: Array) -> Array:
        p, _, q = np.linalg.svd(x)
        flip = np.diag([1.0] * (len(x) - 1) + [np.linalg.det(p @ q)])
        result: Array = p @ flip @ q
        return result

    r = rotation((1 - lam) * np.eye(len(matrix)) + lam * rotation(matrix.T))
    return r.T @ a, b @ r


def test_fedrot_lora_aligns_a_in_the_second_round_and_b_in_the_third(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, *EVEN)
    aggregate("fedit", folders, tmp_path / "fedit", weights=TEXT)
    first = aggregate("fedrot-lora", folders, tmp_path / "one", weights=TEXT)
    assert any("nothing was rotated" in note for note in first.notes)
    for site, matrix in dense(tmp_path / "fedit" / "_global").items():
        close(dense(tmp_path / "one" / "_global")[site], matrix)
    later, new = many(tmp_path / "later", *EVEN, seed=50)
    for number, (before, after, half) in enumerate((("one", "two", "A"), ("two", "three", "B"))):
        aggregate(
            "fedrot-lora",
            later,
            tmp_path / after,
            weights=TEXT,
            previous=tmp_path / before,
            options=["lam=0.7"],
        )
        old = read(tmp_path / before / "_global")
        for site, (a, b, _) in read(tmp_path / after / "_global").items():
            pairs = [turned(each[site][0], each[site][1], old[site], half, 0.7) for each in new]
            close(a, weighted([pair[0] for pair in pairs], WEIGHTS))
            close(b, weighted([pair[1] for pair in pairs], WEIGHTS))
        assert json.loads((tmp_path / after / "aggregate.json").read_text())["round"] == number + 2
        check_noise(tmp_path / after, ideal_of(new, EVEN[1]))
    with pytest.raises(AdapterError, match="give --previous"):
        aggregate("fedrot-lora", folders, tmp_path / "four", options=["round=2"])


def partitions(factors: Any, alphas: Any, weights: Any, site: str) -> Array:
    total = np.zeros(SITES[site])
    for j in range(5):
        owners = [n for n, each in enumerate(factors) if each[site][0].shape[0] > j]
        for n in owners:
            a, b = factors[n][site]
            total += (
                weights[n]
                / sum(weights[o] for o in owners)
                * alphas[n]
                / len(a)
                * np.outer(b[:, j], a[j])
            )
    return total


def test_raflora(tmp_path: Path) -> None:
    folders, factors = many(tmp_path, *MIXED)
    aggregate("raflora", folders, tmp_path / "out", weights=TEXT)
    ideal = {site: partitions(factors, MIXED[1], WEIGHTS, site) for site in SITES}
    for site in SITES:
        close(dense(tmp_path / "out" / "_global")[site], best(ideal[site], 5))
        for number, own in enumerate(MIXED[0]):
            close(dense(tmp_path / "out" / f"c{number}")[site], best(ideal[site], own))
    check_noise(tmp_path / "out", ideal)


def test_raflora_with_one_rank_is_flexlora(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, [3, 3, 3], [6.0, 3.0, 12.0])
    for method in ("raflora", "flexlora"):
        aggregate(method, folders, tmp_path / method, weights=TEXT)
    for site, matrix in dense(tmp_path / "flexlora" / "_global").items():
        close(dense(tmp_path / "raflora" / "_global")[site], matrix)


def test_raflora_keeps_the_directions_that_nobody_owns(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, *MIXED)
    aggregate("raflora", folders, tmp_path / "one")
    aggregate("raflora", folders[:1], tmp_path / "two", previous=tmp_path / "one", rank=7)
    for site, matrix in dense(tmp_path / "two" / "_global").items():
        a, b, scale = read(tmp_path / "one" / "_global")[site]
        close(matrix, dense(folders[0])[site] + scale * b[:, 2:] @ a[2:])


def tagged(folder: Path, indices: list[int], rank: int) -> None:
    (folder / "fedgrove.json").write_text(
        json.dumps({"rank_indices": indices, "global_rank": rank})
    )


def test_fed_plora(tmp_path: Path) -> None:
    held = [
        [0, 3],
        [5, 0, 1],
        [0, 1, 2, 3, 4, 5],
    ]  # the second's rows are in an order of their own; 6, 7 in none
    ranks = [len(each) for each in held]
    alphas = [1.5 * rank for rank in ranks]
    folders, factors = many(tmp_path, ranks, alphas)
    for folder, indices in zip(folders, held, strict=True):
        tagged(folder, indices, 8)
    before, _ = many(tmp_path / "before", [8, 8], [12.0, 12.0], seed=90)
    aggregate("fedit", before, tmp_path / "previous")
    for name, previous in (("with", tmp_path / "previous"), ("without", None)):
        done = aggregate("fed-plora", folders, tmp_path / name, previous=previous)
        assert done.adapters == ("_global",)
        assert any("6, 7" in note for note in done.notes)
        ideal = {}
        for site, (a, b, scale) in read(tmp_path / name / "_global").items():
            assert (len(a), scale) == (8, 1.5)
            old_a, old_b = np.zeros_like(a), np.zeros_like(b)
            if previous:
                old_a, old_b, _ = read(previous / "_global")[site]
            ideal[site] = np.zeros(SITES[site])
            for j in range(8):
                rows = [(n, own.index(j)) for n, own in enumerate(held) if j in own]
                if not rows:
                    assert np.array_equal(a[j], old_a[j])
                    assert np.array_equal(b[:, j], old_b[:, j])
                    ideal[site] += 1.5 * np.outer(b[:, j], a[j])
                    continue
                close(a[j], np.mean([factors[n][site][0][row] for n, row in rows], axis=0))
                close(b[:, j], np.mean([factors[n][site][1][:, row] for n, row in rows], axis=0))
                each = [
                    np.outer(factors[n][site][1][:, row], factors[n][site][0][row])
                    for n, row in rows
                ]
                ideal[site] += 1.5 * np.mean(each, axis=0)
        check_noise(tmp_path / name, ideal)


def test_fed_plora_where_all_hold_everything_is_fedit(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, *EVEN)
    for method in ("fed-plora", "fedit"):
        aggregate(method, folders, tmp_path / method)
    for site, (a, b, _) in read(tmp_path / "fedit" / "_global").items():
        found = read(tmp_path / "fed-plora" / "_global")[site]
        assert np.array_equal(found[0], a)
        assert np.array_equal(found[1], b)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"rank_indices": [0, 1, 1], "global_rank": 4}, "distinct"),
        ({"rank_indices": [0, 1, 4], "global_rank": 4}, r"0\.\.3"),
        ({"rank_indices": [0, 1], "global_rank": 4}, "2 rank_indices for an adapter of rank 3"),
        ({"rank_indices": "0,1,2", "global_rank": 4}, "list of whole numbers"),
        ({"rank_indices": [0, 1, 2]}, "no global_rank"),
        ({"rank_indices": [0, 1, 2], "global_rank": 5}, "global_rank is 5, but 4"),
        ({"rank_indices": [0, 1, 2], "global_rank": "4"}, "whole number"),
        (None, "no fedgrove.json with rank_indices"),
    ],
)
def test_fed_plora_refuses_wrong_tags(card: Any, words: str, tmp_path: Path) -> None:
    folders, _ = many(tmp_path, *EVEN)
    for folder in folders:
        tagged(folder, [0, 2, 3], 4)
    if card is None:
        (folders[1] / "fedgrove.json").unlink()
    else:
        (folders[1] / "fedgrove.json").write_text(json.dumps(card))
    with pytest.raises(AdapterError, match=words):
        aggregate("fed-plora", folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_client_gets_itself_from_every_rule(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, [3], [6.0])
    for method in rules():
        done = aggregate(method, folders, tmp_path / method)
        for name in done.adapters:
            for site, matrix in dense(folders[0]).items():
                if method != "lora-fair":
                    close(dense(tmp_path / method / name)[site], matrix)
        assert done.n_agg is None or method == "lora-fair" or done.n_agg == 0.0
