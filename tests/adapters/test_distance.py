"""Distances between clients' B against loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from fedgrove.adapters.adapter import Site
from fedgrove.adapters.distance import Distance, between, layers_of, towards
from fedgrove.ground.errors import AdapterError

# Out of order on purpose: layer 1 comes first, and layer 4 has one site only.
SITES = {
    name: Site(name, layer, 3, 5)
    for name, layer in [("b.q", 1), ("a.q", 0), ("b.v", 1), ("a.v", 0), ("e.q", 4)]
}


def clients(count: int, seed: int = 0, size: float = 1.0) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [{site: size * torch.randn(5, 2, generator=rng) for site in SITES} for _ in range(count)]


def slow(one: dict[str, Tensor], other: dict[str, Tensor], distance: Distance) -> list[float]:
    result = []
    for layer in (0, 1, 4):
        each = []
        for site, where in SITES.items():
            if where.layer != layer:
                continue
            a, b = one[site].double().flatten().tolist(), other[site].double().flatten().tolist()
            if distance == "frobenius":
                each.append(math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))))
            else:
                norms = [math.sqrt(math.fsum(x * x for x in values)) for values in (a, b)]
                dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
                each.append(
                    0.0
                    if norms == [0, 0]
                    else 1.0
                    if 0 in norms
                    else 1 - dot / (norms[0] * norms[1])
                )
        result.append(sum(each) / len(each))
    return result


def test_layers_are_shallow_to_deep() -> None:
    assert layers_of(SITES) == {0: ["a.q", "a.v"], 1: ["b.q", "b.v"], 4: ["e.q"]}


@pytest.mark.parametrize("distance", ["frobenius", "cosine"])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
def test_every_pair_is_what_a_loop_says(distance: Distance, size: float) -> None:
    everyone = clients(7, size=size)
    everyone[3] = {site: torch.zeros(5, 2) for site in SITES}
    everyone[5] = {site: value.clone() for site, value in everyone[2].items()}
    everyone[6]["a.q"] = torch.zeros(5, 2)
    found = between(everyone, SITES, distance)
    assert found.shape == (3, 7, 7)
    assert found.dtype == torch.float64
    for i in range(7):
        for j in range(7):
            want = slow(everyone[i], everyone[j], distance)
            assert found[:, i, j].tolist() == pytest.approx(want, rel=1e-9, abs=1e-15)
        assert towards(everyone[i], everyone, SITES, distance).tolist() == [
            pytest.approx(row, rel=1e-9, abs=1e-15) for row in found[:, i].tolist()
        ]
    torch.testing.assert_close(
        towards(everyone[0], everyone[1:2], SITES, distance), found[:, 0, 1:2], rtol=1e-9, atol=0
    )
    assert torch.equal(found, found.transpose(1, 2))
    assert found[:, 2, 5].tolist() == [0, 0, 0]
    assert found.diagonal(dim1=1, dim2=2).count_nonzero() == 0


def test_nearly_equal_clients_under_a_large_common_part_keep_their_digits() -> None:
    """A Gram matrix alone would lose all of it: 1e-6 beside 1e3 is 1e-18 when squared."""
    common = {site: value.double() * 1e3 for site, value in clients(1, seed=1)[0].items()}
    near = [
        {site: common[site] + 1e-6 * value.double() for site, value in each.items()}
        for each in clients(4, seed=2)
    ]
    far = [{site: -value for site, value in common.items()}]
    found = between([*near, *far], SITES, "frobenius")
    for i in range(4):
        for j in range(4):
            assert found[:, i, j].tolist() == pytest.approx(
                slow(near[i], near[j], "frobenius"), rel=1e-6
            )


def test_clients_that_do_not_match_are_refused() -> None:
    one, two = clients(2)
    with pytest.raises(AdapterError, match=r"'b\.v'"):
        between([one, {**two, "b.v": torch.zeros(5, 3)}], SITES, "frobenius")
    del two["a.q"]
    with pytest.raises(AdapterError, match=r"'a\.q'"):
        towards(one, [one, two], SITES, "cosine")
