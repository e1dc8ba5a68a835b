"""Shamir's sharing: known vectors, any threshold of shares, and nothing from fewer."""

from __future__ import annotations

import itertools
import secrets

import pytest

from fedgrove.secure.shamir import PRIME, WIDTH, join, split, value_at


def test_the_worked_example_of_the_literature() -> None:
    """S = 1234, 1234 + 166 x + 94 x² modulo 1613: the example of Wikipedia's article."""
    shares = {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}
    assert {x: value_at(x, [1234, 166, 94], 1613) for x in shares} == shares
    for chosen in itertools.combinations(shares, 3):
        assert join({x: shares[x] for x in chosen}, 1613) == 1234


def passes_for_prime(number: int) -> bool:
    """Miller and Rabin's test with the first twelve primes as bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        powers = [pow(base, odd << step, number) for step in range(twos)]
        if powers[0] != 1 and number - 1 not in powers:
            return False
    return True


def test_the_field_is_one_and_holds_32_bytes() -> None:
    """It is the smallest prime above 2^256."""
    assert passes_for_prime(2**127 - 1)
    assert not passes_for_prime(561)
    assert (1 << 256) < PRIME < 1 << 8 * WIDTH
    assert [x for x in range((1 << 256) + 1, PRIME + 1, 2) if passes_for_prime(x)] == [PRIME]


@pytest.mark.parametrize("secret", [0, 1, (1 << 256) - 1, PRIME - 1])
def test_any_threshold_of_shares_gives_the_secret(secret: int) -> None:
    shares = split(secret, range(1, 7), 4)
    for chosen in itertools.combinations(shares, 4):
        assert join({x: shares[x] for x in chosen}) == secret
    assert join(shares) == secret
    assert join({x: shares[x] for x in (1, 2, 3)}) != secret


def test_fewer_shares_fit_every_secret() -> None:
    """For each secret there is one more share that goes with the three: they say nothing of it."""
    shares = split(secrets.randbelow(PRIME), range(1, 5), 4)
    three = {x: shares[x] for x in (1, 2, 3)}
    for secret in (0, 12345, PRIME - 1):
        # the value at 4 of the cubic through (0, secret) and the three
        shifted = {-4: secret, **{x - 4: y for x, y in three.items()}}
        fourth = join({x % PRIME: y for x, y in shifted.items()})
        assert join({**three, 4: fourth}) == secret


def test_shares_are_fresh_each_time() -> None:
    assert split(7, range(1, 4), 2) != split(7, range(1, 4), 2)
    assert split(7, range(1, 4), 1) == {1: 7, 2: 7, 3: 7}


@pytest.mark.parametrize(
    ("secret", "holders", "threshold"),
    [(-1, [1, 2], 2), (PRIME, [1, 2], 2), (1, [1, 2], 3), (1, [0, 1], 2)],
)
def test_what_cannot_be_shared_is_refused(secret: int, holders: list[int], threshold: int) -> None:
    with pytest.raises(ValueError, match=r"secret|holders"):
        split(secret, holders, threshold)
