"""A server that lies to a member: refused with a sentence, before it learns anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.secure.rounds import Round, names, terms, vectors

from fedgrove.secure import keys
from fedgrove.secure.gathering import Gathering
from fedgrove.secure.identity import NodeKeys, OfTheRun
from fedgrove.secure.keys import SecureError
from fedgrove.secure.member import Participant
from fedgrove.secure.messages import Advert, Mail, Opening, Roll

FOUR = names(4)
ME, YOU, THIRD, LAST = FOUR
SECRETS = {name: ec.generate_private_key(ec.SECP384R1()) for name in FOUR}
PUBLICS = {name: key.public_key() for name, key in SECRETS.items()}


def site(name: str, round: int = 1, attempt: str = "attempt") -> Participant:
    own = NodeKeys(SECRETS[name], PUBLICS)
    return Participant.begin(replace(terms(), round=round, attempt=attempt), name, own)


def gathered(**others: Participant) -> tuple[dict[str, Participant], Gathering, dict[str, Roll]]:
    members = {name: others.get(name) or site(name) for name in FOUR}
    gathering = Gathering(terms(), FOUR)
    rolls = gathering.rolls({name: member.memory.advert for name, member in members.items()})
    return members, gathering, rolls


def in_place_of(roll: Roll, name: str, advert: Advert) -> Roll:
    return replace(roll, adverts=[advert if each.name == name else each for each in roll.adverts])


def test_honest_keys_of_sites_are_taken() -> None:
    members, gathering, rolls = gathered()
    parcels = {name: members[name].share(rolls[name]) for name in FOUR}
    assert set(gathering.mails(parcels)[ME].locked) == {YOU, THIRD, LAST}


def other_key(roll: Roll) -> Roll:
    """The server's own keys under a site's name and signature."""
    (yours,) = [each for each in roll.adverts if each.name == YOU]
    return in_place_of(roll, YOU, replace(yours, mask=keys.public_of(keys.new_secret())))


def other_lock(roll: Roll) -> Roll:
    (yours,) = [each for each in roll.adverts if each.name == YOU]
    return in_place_of(roll, YOU, replace(yours, lock=keys.public_of(keys.new_secret())))


def swapped(roll: Roll) -> Roll:
    """One site's keys under another's name."""
    (theirs,) = [each for each in roll.adverts if each.name == THIRD]
    return in_place_of(roll, YOU, replace(theirs, name=YOU))


def signed_by_the_server(roll: Roll) -> Roll:
    mallory = NodeKeys(ec.generate_private_key(ec.SECP384R1()), {})
    return in_place_of(roll, YOU, Participant.begin(terms(), YOU, mallory).memory.advert)


def of_another_round(roll: Roll) -> Roll:
    return in_place_of(roll, YOU, site(YOU, round=2).memory.advert)


def of_another_attempt(roll: Roll) -> Roll:
    return in_place_of(roll, YOU, site(YOU, attempt="earlier").memory.advert)


def a_stranger(roll: Roll) -> Roll:
    mallory = NodeKeys(ec.generate_private_key(ec.SECP384R1()), {})
    return in_place_of(roll, YOU, Participant.begin(terms(), "mallory", mallory).memory.advert)


def twice(roll: Roll) -> Roll:
    (theirs,) = [each for each in roll.adverts if each.name == THIRD]
    return in_place_of(roll, YOU, theirs)


def not_mine(roll: Roll) -> Roll:
    return in_place_of(roll, ME, site(ME).memory.advert)


def short(roll: Roll) -> Roll:
    return replace(roll, adverts=roll.adverts[:-1])


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (other_key, f"keys of '{YOU}' are not signed by it"),
        (other_lock, f"keys of '{YOU}' are not signed by it"),
        (swapped, f"keys of '{YOU}' are not signed by it"),
        (signed_by_the_server, f"keys of '{YOU}' are not signed by it"),
        (of_another_round, f"keys of '{YOU}' are not signed by it for this round"),
        (of_another_attempt, f"keys of '{YOU}' are not signed by it for this round"),
        (a_stranger, "names 'mallory', whose key it does not know"),
        (twice, "one name twice"),
        (not_mine, "others in place of its own"),
        (short, "keys of 3 clients, where a round of 4 gives each 3"),
        (lambda roll: replace(roll, round=2), "is of round 2, not of 1"),
        (lambda roll: replace(roll, size=1, adverts=roll.adverts[:1]), "has 1 clients"),
    ],
)
def test_a_list_of_keys_that_is_not_the_sites_is_refused(
    lie: Callable[[Roll], Roll], words: str
) -> None:
    members, _, rolls = gathered()
    with pytest.raises(SecureError, match=f"{ME} takes no further part.*{words}"):
        members[ME].share(lie(rolls[ME]))
    assert members[ME].memory.roll is None


def test_a_second_list_of_keys_is_refused_and_the_first_answered_alike() -> None:
    members, _, rolls = gathered()
    first = members[ME].share(rolls[ME])
    assert members[ME].share(rolls[ME]) == first
    with pytest.raises(SecureError, match="a second list of keys"):
        members[ME].share(replace(rolls[ME], size=3, adverts=rolls[ME].adverts[:3]))


def masked() -> Round:
    round = Round(FOUR)
    round.run(vectors(FOUR))
    for member in round.members.values():
        member.memory = replace(member.memory, opening=None)  # as before the fourth exchange
    return round


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        (Opening(1, FOUR, [YOU]), f"both secrets of '{YOU}'"),
        (Opening(1, [YOU, THIRD, LAST], [ME]), "without it"),
        (Opening(1, [YOU, THIRD, LAST], []), "without it"),
        (Opening(1, [ME, YOU], [THIRD, LAST]), "2 of 4 updates are there.* fewer than 3"),
        (Opening(1, [ME, ME, ME], [THIRD, LAST]), "1 of 4 updates are there"),
        (Opening(1, [*FOUR, "mallory"], []), "shares of 'mallory', of whom it has none"),
        (Opening(2, FOUR, []), "about round 2, not 1"),
    ],
)
def test_a_question_that_would_show_an_update_is_refused(opening: Opening, words: str) -> None:
    with pytest.raises(SecureError, match=words):
        masked().members[ME].reveal(opening)


def test_both_kinds_of_share_are_not_given_one_after_the_other_either() -> None:
    member = masked().members[ME]
    first = member.reveal(Opening(1, FOUR, []))
    assert set(first.seeds) == set(FOUR)
    assert first.keys == {}
    assert member.reveal(Opening(1, FOUR, [])) == first
    with pytest.raises(SecureError, match="a second time"):
        member.reveal(Opening(1, [ME, THIRD, LAST], [YOU]))


def test_nothing_is_opened_before_an_update_left() -> None:
    members, _, rolls = gathered()
    with pytest.raises(SecureError, match="seen no list of keys"):
        members[ME].reveal(Opening(1, FOUR, []))
    members[ME].share(rolls[ME])
    with pytest.raises(SecureError, match="sent no masked update"):
        members[ME].reveal(Opening(1, FOUR, []))


def test_one_round_s_masks_hide_one_vector() -> None:
    """Two vectors under the same masks would show their difference."""
    members, gathering, rolls = gathered()
    mail = gathering.mails({name: members[name].share(rolls[name]) for name in FOUR})[ME]
    words = vectors(FOUR)[ME]
    first = members[ME].mask(mail, words)
    np.testing.assert_array_equal(members[ME].mask(mail, words), first)
    with pytest.raises(SecureError, match="a second update"):
        members[ME].mask(mail, words + np.uint32(1))
    with pytest.raises(SecureError, match="a second update"):
        members[ME].mask(Mail({name: mail.locked[name] for name in (YOU, THIRD)}), words)


def test_shares_that_were_altered_on_the_way_or_are_somebody_else_s_are_refused() -> None:
    members, gathering, rolls = gathered()
    mails = gathering.mails({name: members[name].share(rolls[name]) for name in FOUR})
    mine, theirs, words = mails[ME], mails[THIRD], vectors(FOUR)[ME]
    bent = {**mine.locked, YOU: mine.locked[YOU][:-2] + "00"}
    for locked in (bent, {**mine.locked, YOU: theirs.locked[YOU]}, {**mine.locked, YOU: "zz"}):
        with pytest.raises(SecureError, match=f"shares that '{YOU}' sent cannot be opened"):
            members[ME].mask(Mail(locked), words)
    with pytest.raises(SecureError, match="not its neighbours"):
        members[ME].mask(Mail({**mine.locked, "mallory": "00"}), words)
    with pytest.raises(SecureError, match="2 of 4 clients gave shares, and 3 must"):
        members[ME].mask(Mail({YOU: mine.locked[YOU]}), words)


def test_a_key_with_which_there_is_no_secret_is_refused() -> None:
    """The point of order one, with which every secret is zero."""
    with pytest.raises(SecureError, match="nothing can be agreed"):
        keys.agreed(keys.new_secret(), bytes(32).hex(), "a test")


def test_a_memory_says_nothing_without_its_parts() -> None:
    """The two secrets of a member are in no message that it sends before the fourth exchange."""
    round = masked()
    for name, member in round.members.items():
        secret = {member.memory.seed, member.memory.key, member.memory.lock}
        told = str(member.memory.advert) + str(member.memory.parcels)
        assert not any(each in told for each in secret), name


def test_simulated_clients_sign_too() -> None:
    one, other = OfTheRun("key", "a"), OfTheRun("key", "b")
    assert other.signed("a", b"message", one.sign(b"message"))
    assert not other.signed("a", b"another", one.sign(b"message"))
    assert not OfTheRun("other", "b").signed("a", b"message", one.sign(b"message"))
