"""A round of secure aggregation: the sum, drop-out between any two exchanges, and what it costs."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from scipy import stats
from tests.secure.rounds import EXCHANGES, Round, names, plain_sum, terms, vectors

from fedgrove.secure.fixed import from_tensor, in_steps, signed, step, to_tensor, to_words
from fedgrove.secure.graph import degree, needed, ring
from fedgrove.secure.keys import SecureError
from fedgrove.secure.messages import Revealed
from fedgrove.secure.room import Room


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_the_sum_is_the_sum(count: int) -> None:
    given = vectors(names(count))
    np.testing.assert_array_equal(Round(names(count)).run(given), plain_sum(given, names(count)))


def test_a_room_takes_the_same_steps() -> None:
    given = vectors(names(4))
    room = Room(terms(), names(4))
    masked = {name: room.mask(name, words) for name, words in given.items()}
    np.testing.assert_array_equal(room.total(masked), plain_sum(given, names(4)))
    np.testing.assert_array_equal(room.total(masked), plain_sum(given, names(4)))


def test_the_mean_is_the_plain_mean_to_a_step() -> None:
    draw = torch.Generator().manual_seed(3)
    clients, bound = names(7), 2.0
    given = {
        n: bound * (2 * torch.rand(500, generator=draw, dtype=torch.float64) - 1) for n in clients
    }
    size = step(7, bound)
    words = {n: to_words(in_steps(x, size, bound, n)) for n, x in given.items()}
    mean = signed(Round(clients).run(words)).double() * size / 7
    expected = sum(given.values(), torch.zeros(500, dtype=torch.float64)) / 7
    assert 0 < float((mean - expected).abs().max()) <= size
    assert size < 2e-8


PAIRS = [
    (dict(zip(who, when, strict=True)))
    for who in itertools.combinations(names(4), 2)
    for when in itertools.product(EXCHANGES, repeat=2)
]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("count", [3, 4, 5])
def test_one_that_goes_away_at_any_exchange_is_no_harm(count: int, exchange: str) -> None:
    for name in names(count):
        round = Round(names(count), terms(0.51), {name: exchange})
        given = vectors(names(count))
        np.testing.assert_array_equal(round.run(given), plain_sum(given, round.here("update")))


@pytest.mark.parametrize("lost", PAIRS, ids=lambda lost: " ".join(lost.values()))
def test_two_of_four_are_too_many_wherever_they_go(lost: dict[str, str]) -> None:
    round = Round(names(4), terms(0.51), lost)
    with pytest.raises(SecureError, match=r"nothing was learnt.* --resume"):
        round.run(vectors(names(4)))


@pytest.mark.parametrize("when", list(itertools.product(EXCHANGES, repeat=2)), ids=" ".join)
def test_any_two_of_five_may_go_away_at_any_exchanges(when: tuple[str, str]) -> None:
    given = vectors(names(5))
    for who in itertools.permutations(names(5), 2):
        round = Round(names(5), terms(0.51), dict(zip(who, when, strict=True)))
        np.testing.assert_array_equal(round.run(given), plain_sum(given, round.here("update")))


def test_what_is_below_the_threshold_stays_closed() -> None:
    """The masked vectors of too few, and all that they would reveal, are noise together."""
    clients = names(4)
    zero = {name: np.zeros(40_000, dtype=np.uint32) for name in clients}
    round = Round(clients, terms(0.75), dict.fromkeys(clients[2:], "update"))
    with pytest.raises(SecureError, match=r"2 of 4 clients sent an update.*asks for 3"):
        round.run(zero)
    assert uniform(sum(round.masked.values(), np.zeros(40_000, dtype=np.uint32)))


def uniform(words: np.ndarray) -> bool:
    """Chi-square of the bytes against 256 equal shares."""
    counts = np.bincount(words.astype("<u4").view(np.uint8), minlength=256)
    return bool(stats.chisquare(counts).pvalue > 1e-4)


def test_a_captured_vector_is_uniform_whatever_is_in_it() -> None:
    count = 100_000
    given = {name: np.full(count, 7, dtype=np.uint32) for name in names(3)}
    round = Round(names(3))
    round.run(given)
    assert not uniform(given[names(3)[0]])
    assert not uniform(sum(round.masked.values(), np.zeros(count, dtype=np.uint32)) * 0)
    for words in round.masked.values():
        assert uniform(words)
        for bit in range(32):
            ones = int(((words >> np.uint32(bit)) & np.uint32(1)).sum())
            assert stats.binomtest(ones, count).pvalue > 1e-6
    for one, other in itertools.combinations(round.masked.values(), 2):
        assert uniform(one + other)  # without the third, and with the self-masks
        assert uniform(one - other)


def test_a_wrong_share_is_passed_over_where_others_do_and_named_where_not() -> None:
    given, clients = vectors(names(5)), names(5)
    round = Round(clients, terms(0.51))
    total = round.run(given)
    openings = round.gathering.openings(clients)
    honest = {name: round.members[name].reveal(openings[name]) for name in clients}
    for liar in clients:
        lies = dict.fromkeys(clients, f"{1:066x}")
        revealed = {**honest, liar: Revealed(lies, {})}
        if liar in (clients[0], clients[-1]):
            np.testing.assert_array_equal(round.gathering.total(round.masked, revealed), total)
    every = dict.fromkeys(clients, Revealed(dict.fromkeys(clients, f"{1:066x}"), {}))
    with pytest.raises(SecureError, match="do not fit together"):
        round.gathering.total(round.masked, every)


# ------------------------------------------------------------ the graph
def test_a_ring_is_even_and_the_same_from_both_sides() -> None:
    found = ring(names(30), 6, "seed")
    assert all(len(set(others)) == 6 and name not in others for name, others in found.items())
    assert all(name in found[other] for name, others in found.items() for other in others)
    assert found != ring(names(30), 6, "another")
    assert ring(names(30), 29, "seed")["c00000"] == names(30)[1:]


def test_small_rounds_have_all_as_neighbours_and_large_ones_few() -> None:
    assert [degree(clients, 0.51) for clients in (2, 3, 64)] == [1, 2, 63]
    thousand, million = degree(1000, 0.51), degree(1_000_000, 0.51)
    assert thousand < 150
    assert million < 2.5 * thousand  # a thousand times the clients
    assert degree(1000, 0.51, 7) == 8
    assert degree(5, 0.51, 100) == 4


@pytest.mark.parametrize(
    ("threshold", "clients", "least"),
    [(2 / 3, 3, 2), (2 / 3, 4, 3), (0.51, 2, 2), (0.75, 4, 3), (1.0, 9, 9)],
)
def test_how_many_must_answer(threshold: float, clients: int, least: int) -> None:
    assert needed(threshold, clients) == least


@pytest.mark.slow
def test_a_thousand_clients_of_whom_three_hundred_are_lost() -> None:
    """At all four exchanges. What each sends and is sent grows with its neighbours, not with all."""
    costs, seconds = {}, {}
    for count in (250, 1000):
        clients = names(count)
        gone = np.random.default_rng(1).choice(clients, size=3 * count // 10, replace=False)
        lost = {str(name): EXCHANGES[place % 4] for place, name in enumerate(gone)}
        given, round = vectors(clients, 100), Round(clients, terms(0.51), lost)
        began = time.process_time()
        total = round.run(given)
        seconds[count] = time.process_time() - began
        np.testing.assert_array_equal(total, plain_sum(given, round.here("update")))
        costs[count] = max(round.bytes.values())
    print(costs, seconds, {count: degree(count, 0.51) for count in costs})
    # four times the clients: a little more for each, because log n is
    assert costs[1000] < 1.6 * costs[250]
    assert math.isclose(
        costs[1000] / degree(1000, 0.51), costs[250] / degree(250, 0.51), rel_tol=0.2
    )


def test_masks_are_the_bits_of_an_int32() -> None:
    words = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32)
    assert to_tensor(words).tolist() == [0, 1, -(2**31), -1]
    np.testing.assert_array_equal(from_tensor(to_tensor(words)), words)
