"""Routers against what their papers' formulas give in dense float64, written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.assembly import Inner, Mix, Term, products
from fedgrove.adapters.routers import (
    Arrow,
    Attention,
    Components,
    Retrieve,
    cosines,
    densities,
    remainders,
    top,
)
from fedgrove.adapters.tally import Tally
from fedgrove.pools.build import triplets
from fedgrove.pools.signature import gaussian, threshold

SITE = Site("layer.0.query", 0, 7, 5)
B, T, H = 4, 6, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int, rank: int = 3, scale: float = 2.0) -> Factors:
    return Factors(draw(rank, 7, seed=seed), draw(5, rank, seed=seed + 100), scale)


def ran(
    mix: Mix,
    members: Sequence[Factors],
    x: Tensor,
    features: Tensor | None = None,
    extras: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tally]:
    """[b, t, out] that the site adds, and who ran."""
    found = extras or {}
    terms = [Term(str(i), {SITE.name: each}, train="") for i, each in enumerate(members)]
    tally = Tally(len(x), None)
    choice = mix.choose(features, found, len(x))
    result = torch.zeros(*x.shape[:2], 5, dtype=torch.float64)
    for product in products(SITE, x, terms, mix, found, (), features, choice, tally):
        result = product.onto(result, x)
    return result, tally


X, FEATURES = draw(B, T, 7, seed=7), draw(B, H, seed=8)
MEANS = {"signature.mean": draw(5, H, seed=9)}
FIVE = [factors(i) for i in range(5)]


def nearest(row: Tensor, k: int) -> list[int]:
    near = [float(row @ mean / row.norm() / mean.norm()) for mean in MEANS["signature.mean"]]
    return sorted(range(5), key=lambda i: -near[i])[:k]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("compose", ["mixture", "fusion"])
def test_retrieval_adds_up_what_the_nearest_members_compute(k: int, compose: Any) -> None:
    got, tally = ran(Retrieve(k, compose), FIVE, X, FEATURES, MEANS)
    for b in range(B):
        chosen = [FIVE[i] for i in nearest(FEATURES[b], k)]
        if compose == "mixture":
            whole = sum((each.product() for each in chosen), torch.zeros(5, 7)) / k
        else:
            up = sum((each.B for each in chosen), torch.zeros(5, 3)) / k
            whole = 2.0 * up @ (sum((each.A for each in chosen), torch.zeros(3, 7)) / k)
        torch.testing.assert_close(got[b], X[b] @ whole.T, atol=1e-12, rtol=1e-12)
        shares = tally.shares()[b]
        assert sorted(shares.nonzero().flatten().tolist()) == sorted(nearest(FEATURES[b], k))
        assert float(shares.sum()) == pytest.approx(1)


def test_a_fusion_is_the_mixture_and_the_cross_terms() -> None:
    mixture, _ = ran(Retrieve(3), FIVE, X, FEATURES, MEANS)
    fusion, _ = ran(Retrieve(3, "fusion"), FIVE, X, FEATURES, MEANS)
    for b in range(B):
        chosen = [FIVE[i] for i in nearest(FEATURES[b], 3)]
        cross = torch.zeros(5, 7, dtype=torch.float64)
        for i, one in enumerate(chosen):
            cross += 2.0 * one.B @ one.A * (1 / 9 - 1 / 3)
            for j, other in enumerate(chosen):
                if i != j:
                    cross += 2.0 * one.B @ other.A / 9
        torch.testing.assert_close((fusion - mixture)[b], X[b] @ cross.T, atol=1e-12, rtol=1e-12)


def test_members_that_no_row_chose_do_not_run() -> None:
    features = MEANS["signature.mean"][[2, 2, 4, 2]]
    terms = [Term(str(i), {SITE.name: each}, train="") for i, each in enumerate(FIVE)]
    mix = Retrieve(1)
    choice = mix.choose(features, MEANS, B)
    found = products(SITE, X, terms, mix, MEANS, (), features, choice, Tally(B, None))
    assert [product.term for product in found] == ["2", "4"]
    weights = [product.weight for product in found]
    assert all(isinstance(each, Inner) for each in weights)
    counts = [len(each.tokens) for each in weights if isinstance(each, Inner)]
    assert counts == [3 * T, T]


def test_arrow_is_its_formula_at_mixed_ranks() -> None:
    members = [factors(i, rank=1 + i % 3) for i in range(4)]
    prototypes = torch.stack([torch.linalg.svd(each.product())[2][0] for each in members])
    extras = {f"prototypes.{SITE.name}": prototypes}
    for score in ("inner", "cosine"):
        got, tally = ran(Arrow(2, score), members, X, extras=extras)
        shares = torch.zeros(B, 4, dtype=torch.float64)
        for b in range(B):
            for t in range(T):
                x = X[b, t]
                near = (prototypes @ x).abs()
                if score == "cosine":
                    near = near / x.norm()
                best = near.topk(2).indices
                weights = near[best].softmax(0)
                wanted = sum(
                    (w * members[i].product() @ x for i, w in zip(best, weights, strict=True)),
                    torch.zeros(5, dtype=torch.float64),
                )
                torch.testing.assert_close(got[b, t], wanted, atol=1e-12, rtol=1e-12)
                shares[b, best] += weights / T
        torch.testing.assert_close(tally.shares(), shares, atol=1e-12, rtol=1e-12)


def test_arrow_passes_over_members_that_lack_the_site() -> None:
    extras = {f"prototypes.{SITE.name}": torch.cat([draw(2, 7, seed=1), torch.zeros(1, 7)])}
    terms = [Term(str(i), {SITE.name: FIVE[i]}, train="") for i in range(2)]
    terms.append(Term("2", {}, train=""))
    tally = Tally(B, None)
    products(SITE, X, terms, Arrow(3), extras, (), None, None, tally)
    assert float(tally.shares()[:, 2].abs().max()) == 0
    torch.testing.assert_close(tally.shares().sum(1), torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_arrow_is_peft_s(seed: int) -> None:
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.tuners.lora.config import ArrowConfig

    names = [f"task_{i}" for i in range(4)]
    members = [factors(10 * seed + i) for i in range(4)]
    config = ArrowConfig(top_k=3, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = names, []
    layer = ArrowLoraLinearLayer(7, config)
    down, up = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    for name, each in zip(names, members, strict=True):
        down[name] = torch.nn.Linear(7, 3, bias=False, dtype=torch.float64)
        up[name] = torch.nn.Linear(3, 5, bias=False, dtype=torch.float64)
        down[name].weight.data, up[name].weight.data = each.A, each.B
    # exact vectors in place of a power iteration of 15 steps
    prototypes = torch.stack([torch.linalg.svd(each.product())[2][0] for each in members])
    layer.register_buffer("prototypes", prototypes)
    scales = dict.fromkeys(names, 2.0)
    with torch.no_grad():
        wanted = layer(X, down, up, torch.nn.Identity(), scales)
    got, _ = ran(Arrow(3), members, X, extras={f"prototypes.{SITE.name}": prototypes})
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def attention(seed: int = 3) -> dict[str, Tensor]:
    return {
        f"router.A.{SITE.name}": draw(2, 7, seed=seed),
        f"router.B.{SITE.name}": draw(5, 2, seed=seed + 1),
        **MEANS,
    }


def test_attention_is_its_formula() -> None:
    extras = attention()
    got, tally = ran(Attention(3), FIVE, X, FEATURES, extras)
    down, up = extras[f"router.A.{SITE.name}"], extras[f"router.B.{SITE.name}"]
    for b in range(B):
        chosen = nearest(FEATURES[b], 3)
        for t in range(T):
            parts = [FIVE[i].product() @ X[b, t] for i in chosen]
            near = torch.stack([(down @ X[b, t]) @ (up.T @ v) / math.sqrt(2) for v in parts])
            weights = near.softmax(0)
            wanted = sum(
                (w * v for w, v in zip(weights, parts, strict=True)),
                torch.zeros(5, dtype=torch.float64),
            )
            torch.testing.assert_close(got[b, t], wanted, atol=1e-12, rtol=1e-12)
    assert int((tally.shares()[0] > 0).sum()) == 3


def test_attention_without_a_query_is_the_mixture() -> None:
    extras = attention() | {f"router.A.{SITE.name}": torch.zeros(2, 7, dtype=torch.float64)}
    got, _ = ran(Attention(3), FIVE, X, FEATURES, extras)
    wanted, _ = ran(Retrieve(3), FIVE, X, FEATURES, MEANS)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------- components
def clouds(count: int = 12, scale: float = 1.0) -> list[Tensor]:
    """Features [m, h] of five members; close to one direction each."""
    return [
        scale * (MEANS["signature.mean"][i] + 0.4 * draw(count, H, seed=30 + i)) for i in range(5)
    ]


def signed(groups: Sequence[Tensor], ranks: Sequence[int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"signature.rank": torch.tensor(ranks, dtype=torch.float64)}
    means, rests, limits = [], [], []
    for number, z in enumerate(groups):
        mean, axes, spread, rest = gaussian(z)
        found[f"signature.axes.{number}"], found[f"signature.spread.{number}"] = axes, spread
        means.append(mean)
        rests.append(rest)
        limits.append(threshold(z))
    found["signature.mean"] = torch.stack(means)
    found["signature.rest"] = torch.tensor(rests, dtype=torch.float64)
    found["signature.threshold"] = torch.tensor(limits, dtype=torch.float64)
    return found


def units(values: Tensor) -> Tensor:
    return values / values.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("count", [4, 40])  # fewer and more than features
def test_densities_are_scipy_s(count: int) -> None:
    groups = [units(each) for each in clouds(count)]
    got = densities(units(FEATURES), signed(groups, [3] * 5))
    for i, z in enumerate(groups):
        S = np.cov(z.numpy(), rowvar=False)
        if count <= H:
            trace, square = np.trace(S), np.trace(S @ S)
            over = (1 - 2 / H) * square + trace**2
            share = min(1.0, over / ((count + 1 - 2 / H) * (square - trace**2 / H)))
            S = (1 - share) * S + share * trace / H * np.eye(H)
        exact = multivariate_normal(z.mean(0).numpy(), S).logpdf(units(FEATURES).numpy()) / H
        np.testing.assert_allclose(got[:, i].numpy(), exact, rtol=1e-10)


def test_the_quantile_rule_does_not_see_the_scale_of_features() -> None:
    for scale in (1.0, 10.0, 0.01):
        groups = clouds(scale=scale)
        extras = signed(groups, [3] * 5)
        z = scale * (MEANS["signature.mean"][[0, 3]] + 0.1)
        above = densities(z, extras) > extras["signature.threshold"]
        if scale == 1.0:
            first, positive = above, densities(z, extras) > 0
        assert torch.equal(above, first)
        if scale == 0.01:  # the published rule does
            assert not torch.equal(densities(z, extras) > 0, positive)


@pytest.mark.parametrize("kind", ["svd", "trained"])
def test_components_are_their_formula(kind: Any) -> None:
    ranks = [3, 2, 3, 1, 3]
    members = [factors(i, rank=rank) for i, rank in enumerate(ranks)]
    extras = signed([units(each) for each in clouds()], ranks)
    mix = Components(3, gamma=0.5, components=kind, tau=0.05)
    features = MEANS["signature.mean"][[0, 1, 1, 4]] + 0.4 * draw(B, H, seed=55)
    run_ = members
    if kind == "svd":
        run_ = [triplets({SITE.name: each})[SITE.name] for each in members]
    got, tally = ran(mix, run_, X, features, extras)
    g = densities(units(features), extras)
    for b in range(B):
        above = [i for i in range(5) if g[b, i] > extras["signature.threshold"][i]]
        chosen = above or sorted(g[b].topk(3).indices.tolist())
        total = max(1, math.floor(0.5 * sum(ranks[i] for i in chosen)))
        odds = (g[b, chosen] / 0.05).softmax(0).tolist()
        dealt = remainders(total, odds, [ranks[i] for i in chosen])
        gain = math.sqrt(sum(ranks[i] for i in chosen) / len(chosen) / total)
        for t in range(T):
            wanted = torch.zeros(5, dtype=torch.float64)
            for i, count in zip(chosen, dealt, strict=True):
                each = members[i]
                if kind == "svd":
                    u, s, vh = torch.linalg.svd(each.product(), full_matrices=False)
                    parts = [(s[j] * vh[j] @ X[b, t], u[:, j]) for j in range(each.rank)]
                    parts.sort(key=lambda part: -abs(float(part[0])))
                    for value, up in parts[:count]:
                        wanted += gain * value * up
                else:
                    inner = each.A @ X[b, t]
                    for j in inner.abs().argsort(descending=True)[:count]:
                        wanted += gain * each.scale * inner[j] * each.B[:, j]
            torch.testing.assert_close(got[b, t], wanted, atol=1e-11, rtol=1e-11)
        shares = torch.zeros(5, dtype=torch.float64)
        shares[chosen] = torch.tensor(dealt, dtype=torch.float64) / total
        torch.testing.assert_close(tally.shares()[b], shares)


def test_singular_components_do_not_see_the_basis_of_the_factors() -> None:
    extras = signed([units(each) for each in clouds()], [3] * 5)
    turned = []
    for number, each in enumerate(FIVE):
        R = draw(3, 3, seed=70 + number)
        turned.append(Factors(R @ each.A, each.B @ R.inverse(), each.scale))

    def svd(members: Sequence[Factors]) -> list[Factors]:
        return [triplets({SITE.name: each})[SITE.name] for each in members]

    mix = Components(3)
    one, _ = ran(mix, svd(FIVE), X, FEATURES, extras)
    other, _ = ran(mix, svd(turned), X, FEATURES, extras)
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    trained = Components(3, components="trained")
    one, _ = ran(trained, FIVE, X, FEATURES, extras)
    other, _ = ran(trained, turned, X, FEATURES, extras)
    assert not torch.allclose(one, other)  # the trap


@pytest.mark.parametrize(
    ("total", "odds", "caps", "wanted"),
    [
        (4, [0.5, 0.3, 0.2], [4, 4, 4], [2, 1, 1]),
        (5, [0.9, 0.1], [3, 3], [3, 2]),
        (3, [1.0, 0.0, 0.0], [1, 1, 1], [1, 1, 1]),
        (9, [0.5, 0.5], [2, 2], [2, 2]),
        (1, [0.4, 0.6], [3, 3], [0, 1]),
    ],
)
def test_a_budget_is_dealt_by_largest_remainder(
    total: int, odds: list[float], caps: list[int], wanted: list[int]
) -> None:
    assert remainders(total, odds, caps) == wanted


def test_drawn_budgets_are_the_example_s_own() -> None:
    extras = signed([units(each) for each in clouds()], [3] * 5)
    mix = Components(3, sampling="multinomial")
    whole = mix.choose(FEATURES, extras, B)
    alone = [mix.choose(FEATURES[b : b + 1], extras, 1) for b in range(B)]
    assert torch.equal(whole.weights, torch.cat([each.weights for each in alone]))


@pytest.mark.parametrize("mix", [Retrieve(2), Retrieve(2, "fusion"), Attention(2), Components(2)])
def test_a_batch_is_its_rows_one_by_one(mix: Any) -> None:
    extras = signed([units(each) for each in clouds()], [3] * 5) | attention()
    whole, _ = ran(mix, FIVE, X, FEATURES, extras)
    alone = [ran(mix, FIVE, X[b : b + 1], FEATURES[b : b + 1], extras)[0] for b in range(B)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-12, rtol=1e-12)


def test_retrieval_compares_directions() -> None:
    scores = cosines(FEATURES, MEANS["signature.mean"])
    torch.testing.assert_close(cosines(3 * FEATURES, 5 * MEANS["signature.mean"]), scores)
    assert torch.equal(top(scores, 2).sum(1), torch.ones(B, dtype=torch.float64))


def test_tokens_of_what_is_written_later_are_not_counted() -> None:
    tally = Tally(2, torch.ones(2, 3, dtype=torch.bool))
    tally.note_tokens(0, torch.tensor([[1.0, 0.0]] * 6))
    tally.note_tokens(0, torch.tensor([[0.0, 1.0]] * 2))  # one more token each
    assert tally.shares().tolist() == [[1.0, 0.0]] * 2


def test_padding_is_not_counted() -> None:
    tally = Tally(1, torch.tensor([[True, True, False]]))
    tally.note_tokens(1, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    tally.note_tokens(3, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert tally.shares().tolist() == [[0.75, 0.25]]
    assert {layer: each.tolist() for layer, each in tally.by_layer().items()} == {
        1: [[0.5, 0.5]],
        3: [[1.0, 0.0]],
    }
