"""Means inside and outside groups against sums in float64."""

import pytest
import torch

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.groups import group_means
from fedgrove.ground.errors import AdapterError


def adapters(count: int, sizes: list[float] | None = None) -> list[Adapter]:
    rng = torch.Generator().manual_seed(3)
    sizes = sizes or [1.0] * count
    return [
        {
            site: Factors(
                size * torch.randn(2, 4, generator=rng),
                size * torch.randn(3, 2, generator=rng),
                1.5,
            )
            for site in ("x", "y")
        }
        for size in sizes
    ]


def slow(members: list[Adapter], weights: list[float], site: str, letter: str) -> torch.Tensor:
    total = sum(weights)
    return torch.stack(
        [
            w / total * getattr(m[site], letter).double()
            for m, w in zip(members, weights, strict=True)
        ]
    ).sum(0)


@pytest.mark.parametrize("weights", [[1.0] * 7, [3.0, 1.0, 250.0, 4.0, 1.0, 9.0, 2.0]])
@pytest.mark.parametrize(
    "labels", [[0, 1, 0, 2, 1, 0, 2], [0, 0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
)
# The last client is a thousand billion times larger: what is left of a subtraction from the total
# would be noise.
@pytest.mark.parametrize("last", [1.0, 1e12])
def test_inside_outside_and_all(labels: list[int], weights: list[float], last: float) -> None:
    everyone = adapters(7, [1.0] * 6 + [last])
    found = group_means(everyone, labels, weights)
    count = max(labels) + 1
    assert len(found.own) == len(found.rest) == count
    for group in range(count):
        for inside, got in ((True, found.own[group]), (False, found.rest[group])):
            chosen = [i for i, label in enumerate(labels) if (label == group) == inside]
            for site in ("x", "y"):
                for letter in "AB":
                    want = slow(
                        [everyone[i] for i in chosen], [weights[i] for i in chosen], site, letter
                    )
                    torch.testing.assert_close(
                        getattr(got[site], letter).double(),
                        want,
                        rtol=1e-6,
                        atol=1e-6 * float(want.abs().max()),
                    )
                assert got[site].scale == 1.5
                assert got[site].A.dtype == torch.float32
    torch.testing.assert_close(
        found.everyone["x"].A.double(),
        slow(everyone, weights, "x", "A"),
        rtol=1e-6,
        atol=1e-6 * last,
    )


@pytest.mark.parametrize("count", [1, 3, 49])
def test_one_group_of_all_is_fedits_mean_bit_for_bit(count: int) -> None:
    everyone = adapters(count)
    found = group_means(everyone, [0] * count, [1.0] * count)
    want = mean(everyone, [1.0 / count] * count)
    for site in ("x", "y"):
        assert torch.equal(found.own[0][site].A, want[site].A)
        assert torch.equal(found.own[0][site].B, want[site].B)
    assert found.rest == [{}]
    assert found.everyone is found.own[0]


def test_unequal_scales_are_refused() -> None:
    one, two = adapters(2)
    two["y"] = Factors(two["y"].A, two["y"].B, 2.0)
    with pytest.raises(AdapterError, match="scales"):
        group_means([one, two], [0, 0], [1.0, 1.0])
