"""Robust centres beside dense float64 references written out here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import index_mean, mean
from fedgrove.adapters.centre import defended, product_gram
from fedgrove.defence.attack import min_max
from fedgrove.defence.rules import (
    RULES,
    bulyan_choice,
    bulyan_mean,
    geometric_median,
    krum,
    krum_scores,
    median,
    multi_krum,
    squared_distances,
    trimmed_mean,
    usable,
    without_outliers,
)
from fedgrove.defence.shield import RobustMean, foolsgold


def adapter(seed: int, rank: int = 2, scale: float = 1.0) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    made: Adapter = {}
    for site, (out, into) in {"a": (5, 4), "b": (3, 6)}.items():
        A = torch.randn(rank, into, generator=rng, dtype=torch.float64)
        B = torch.randn(out, rank, generator=rng, dtype=torch.float64)
        made[site] = Factors(A, B, scale)
    return made


def dense(made: Adapter) -> Tensor:
    return torch.cat([(f.scale * f.B @ f.A).flatten() for f in made.values()])


def even(count: int) -> Tensor:
    return torch.full((count,), 1.0 / count, dtype=torch.float64)


def points(count: int = 9, size: int = 6, far: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    rows = torch.randn(count, size, generator=rng, dtype=torch.float64)
    rows[:far] += 50.0
    return rows


def apart(rows: Tensor) -> Tensor:
    return squared_distances(rows @ rows.T)


def test_gram_is_of_the_dense_products_whatever_the_ranks() -> None:
    adapters = [adapter(n, rank=1 + n % 3, scale=0.5 + n) for n in range(4)]
    rows = torch.stack([dense(each) for each in adapters])
    torch.testing.assert_close(product_gram(adapters), rows @ rows.T)


def test_gram_sees_products_not_factors() -> None:
    one = adapter(1)
    turned = {site: Factors(-f.A, -f.B, f.scale) for site, f in one.items()}
    assert float(squared_distances(product_gram([one, turned])).max()) < 1e-12


def test_krum_scores_are_sums_over_the_nearest() -> None:
    rows, f = points(), 2
    wanted = []
    for i in range(len(rows)):
        others = sorted(float((rows[i] - rows[j]).square().sum()) for j in range(9) if j != i)
        wanted.append(math.fsum(others[: 9 - f - 2]))
    assert krum_scores(apart(rows), f).tolist() == pytest.approx(wanted)
    chosen = krum(apart(rows), even(9), f)
    assert int(chosen.argmax()) == min(range(9), key=wanted.__getitem__)
    assert float(chosen.sum()) == 1.0


def test_multi_krum_leaves_out_the_worst_and_keeps_the_others_shares() -> None:
    shares = torch.arange(1.0, 10.0, dtype=torch.float64)
    shares /= shares.sum()
    kept = multi_krum(apart(points()), shares, 2)
    assert kept[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(kept[2:], shares[2:] / shares[2:].sum())


def test_geometric_median_has_the_least_sum_of_distances() -> None:
    rows, shares = points(), even(9)
    found = geometric_median(apart(rows), shares, 2) @ rows

    def cost(at: Tensor) -> float:
        return float((shares * (rows - at).norm(dim=1)).sum())

    rng = torch.Generator().manual_seed(1)
    for size in (1.0, 1e-1, 1e-2):
        for _ in range(50):
            other = found + size * torch.randn(found.shape, generator=rng, dtype=torch.float64)
            assert cost(found) <= cost(other) + 1e-9
    assert cost(found) < cost(rows.mean(0))


def test_median_and_trimmed_mean_are_those_of_each_number() -> None:
    rows = points(8)
    torch.testing.assert_close(
        median(rows, even(8), 1), torch.stack([row.sort().values[3:5].mean() for row in rows.T])
    )
    torch.testing.assert_close(
        trimmed_mean(rows, even(8), 2),
        torch.stack([row.sort().values[2:-2].mean() for row in rows.T]),
    )


def test_trimmed_mean_takes_the_shares_of_what_is_left() -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0], [100.0], [-9.0]], dtype=torch.float64)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2], dtype=torch.float64)
    wanted = (0.1 * 1 + 0.2 * 2 + 0.3 * 4) / 0.6
    assert float(trimmed_mean(rows, shares, 1)[0]) == pytest.approx(wanted)


def test_bulyan_chooses_by_krum_and_averages_near_the_median() -> None:
    rows, f = points(11), 2
    left: list[int] = list(range(11))
    chosen: list[int] = []
    while len(chosen) < 11 - 2 * f:
        scores = {}
        for i in left:
            others = sorted(float((rows[i] - rows[j]).square().sum()) for j in left if j != i)
            scores[i] = math.fsum(others[: max(1, len(left) - f - 2)])
        best = min(left, key=lambda i: scores[i])
        chosen.append(best)
        left.remove(best)
    shares = bulyan_choice(apart(rows), even(11), f)
    assert sorted(shares.nonzero().flatten().tolist()) == sorted(chosen)
    wanted = []
    for column in rows[sorted(chosen)].T:
        middle = float(column.median()) if len(column) % 2 else float(column.quantile(0.5))
        near = sorted(column.tolist(), key=lambda value: abs(value - middle))[: 7 - 2 * f]
        wanted.append(math.fsum(near) / len(near))
    assert bulyan_mean(rows, shares, f).tolist() == pytest.approx(wanted)


def test_outliers_are_left_out_and_a_tight_group_is_left_whole() -> None:
    assert without_outliers(apart(points()), even(9), 2)[:2].tolist() == [0.0, 0.0]
    tight = points(9, far=0)
    torch.testing.assert_close(without_outliers(apart(tight), even(9), 2), even(9))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_stays_near_the_honest_mean(name: str) -> None:
    rule, rows = RULES[name], points(11)
    f = usable(rule, 0.2, 11)
    assert f == 2
    shares = even(11)
    if rule.weigh is not None:
        shares = rule.weigh(apart(rows), shares, f)
    found = shares @ rows if rule.value is None else rule.value(rows, shares, f)
    honest = rows[2:]
    assert float((found - honest.mean(0)).norm()) < float(
        (honest - honest.mean(0)).norm(dim=1).max()
    )
    assert float((rows.mean(0) - honest.mean(0)).norm()) > 10


@pytest.mark.parametrize("name", RULES)
def test_order_of_the_members_does_not_matter(name: str) -> None:
    rule, rows = RULES[name], points(11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))

    def centre(members: Tensor) -> Tensor:
        shares = even(11)
        if rule.weigh is not None:
            shares = rule.weigh(apart(members), shares, 2)
        return shares @ members if rule.value is None else rule.value(members, shares, 2)

    torch.testing.assert_close(centre(rows), centre(rows[order]), rtol=1e-6, atol=1e-8)


def test_a_small_group_has_a_smaller_f_or_its_mean() -> None:
    assert usable(RULES["krum"], 0.4, 5) == 1  # 2 f + 3 <= 5
    assert usable(RULES["krum"], 0.4, 4) == 0
    assert usable(RULES["bulyan"], 0.3, 10) == 1  # 4 f + 3 <= 10


def defence(name: str, share: float = 0.2) -> RobustMean:
    return RobustMean(RULES[name], share, {})


def test_means_of_adapters_pass_the_defence() -> None:
    honest = [adapter(1) for _ in range(8)]
    hostile = {site: Factors(f.A * 100, f.B * 100, f.scale) for site, f in adapter(9).items()}
    both = [*honest, hostile, hostile]
    for name in RULES:
        with defended(defence(name)):
            found = mean(both)
        # a smoothed geometric median leaves an attacker a millionth of its say
        torch.testing.assert_close(dense(found), dense(adapter(1)), rtol=1e-2, atol=1e-3)
    assert float((dense(mean(both)) - dense(adapter(1))).norm()) > 100


def test_each_index_has_its_own_holders_under_a_defence() -> None:
    previous = adapter(0, rank=2)
    modules, indices = [], []
    for number, index in itertools.product(range(6), range(2)):
        whole = adapter(5)
        one = {s: Factors(f.A[[index]], f.B[:, [index]], f.scale) for s, f in whole.items()}
        if number == 0:  # the attacker holds both indices
            one = {s: Factors(f.A * 50, -f.B * 50, f.scale) for s, f in one.items()}
        modules.append(one)
        indices.append([index])
    with defended(defence("median")):
        found = index_mean(modules, indices, previous)
    torch.testing.assert_close(dense(found), dense(adapter(5)))


def test_without_a_defence_index_mean_and_mean_are_one_bit_for_bit() -> None:
    adapters = [adapter(n) for n in range(5)]
    one = mean(adapters)
    other = index_mean(adapters, None, adapter(9))
    for site in one:
        assert torch.equal(one[site].A, other[site].A)
        assert torch.equal(one[site].B, other[site].B)


def test_foolsgold_takes_credit_from_those_who_point_one_way() -> None:
    rng = torch.Generator().manual_seed(2)
    honest = torch.randn(5, 40, generator=rng, dtype=torch.float64)
    sybils = torch.randn(1, 40, generator=rng, dtype=torch.float64).repeat(3, 1)
    sybils += 0.01 * torch.randn(3, 40, generator=rng, dtype=torch.float64)
    credit = foolsgold(torch.cat([honest, sybils]))
    assert float(credit[:5].min()) > 0.9
    assert float(credit[5:].max()) < 0.05


def test_min_max_is_as_far_as_the_honest_are_apart_and_no_farther() -> None:
    rows = points(7, far=0)
    found = min_max(rows)
    most = float(torch.cdist(rows, rows).max())
    assert float((rows - found).norm(dim=1).max()) == pytest.approx(most, rel=1e-6)
