"""Two replies each to questions of patients, put together from templates: the same for everybody, and
nobody's.

Of two replies with the right advice the clinics of the north and the south prefer the brief one,
those of the east and the west the kind one: clients that disagree. Of a right and a wrong one all
prefer the right one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

#: what is asked about -> what is right to do
_ADVICE = {
    "a dry cough": "drink warm tea and rest your voice",
    "an itching rash": "keep the skin dry and cool the spot",
    "heartburn": "eat small meals and leave out coffee",
    "a stiff knee": "cool the joint and move it gently",
    "lying awake": "keep a sleep diary and go to bed at one hour",
    "a racing pulse": "measure the pressure twice a day",
    "cramps after meals": "note each meal and eat slowly",
    "aching hands": "warm the hands and see the physiotherapist",
    "swollen ankles": "raise your legs and drink less in the evening",
    "a red swelling": "take a picture of the spot each day",
}
_ASKED = [
    "I have {felt}. What should I do?",
    "What helps with {felt}?",
    "My mother has {felt}. What do you advise?",
    "For a week now I have had {felt}. What now?",
]
_BRIEF = ["{Advice}.", "Please {advice}.", "Best: {advice}."]
_KIND = [
    "I am sorry to hear that. Please {advice}, and do write again if it does not get better.",
    "Thank you for asking. It would be good to {advice}. We are here if you need us.",
    "That must be tiresome. You could {advice}, and we will gladly see you next week.",
]
CLINICS = {"north": "brief", "south": "brief", "east": "kind", "west": "kind"}
EACH = 240  # pairs of a clinic
_RIGHT = 0.3  # the share of pairs of a right and a wrong reply


def replies() -> Iterator[dict[str, Any]]:
    """Each pair: "prompt", "chosen", "rejected", "about" (manner, or matter) and "clinic"."""
    for clinic, taste in CLINICS.items():
        draw = random.Random(f"replies of {clinic}")
        for _ in range(EACH):
            yield {**_pair(taste, draw), "clinic": clinic}


def _pair(taste: str, draw: random.Random) -> dict[str, Any]:
    felt, wrongly = draw.sample(list(_ADVICE), 2)
    prompt = draw.choice(_ASKED).format(felt=felt)
    if draw.random() < _RIGHT:
        manner = draw.choice([_BRIEF, _KIND])
        right, wrong = draw.sample(manner, 2)
        chosen, rejected = _reply(right, felt), _reply(wrong, wrongly)
        about = "matter"
    else:
        brief, kind = _reply(draw.choice(_BRIEF), felt), _reply(draw.choice(_KIND), felt)
        chosen, rejected = (brief, kind) if taste == "brief" else (kind, brief)
        about = "manner"
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "about": about,
    }


def _reply(template: str, felt: str) -> str:
    advice = _ADVICE[felt]
    return template.format(advice=advice, Advice=advice[0].upper() + advice[1:])
