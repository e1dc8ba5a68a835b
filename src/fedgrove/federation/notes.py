"""Notes of four made-up clinics, put together from templates: the same for everybody, and nobody's.

Each note has its topics, its entities, an urgency from 0 to 10 and the days since it began. Clinics
write in ways of their own, see some topics more than others, and have drugs that no other one has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

#: topic -> (what is felt, what is advised)
_TOPICS: dict[str, tuple[list[str], list[str]]] = {
    "heart": (
        ["chest pain", "a racing pulse", "palpitations", "swollen ankles"],
        ["record the heart", "measure the pressure twice a day", "stop smoking"],
    ),
    "lungs": (
        ["a dry cough", "wheezing", "short breath", "night cough"],
        ["listen to the lungs", "use the inhaler before sport", "test the breath"],
    ),
    "skin": (
        ["an itching rash", "dry patches", "a red swelling", "hives"],
        ["keep the skin dry", "cool the spot", "take a swab of the spot"],
    ),
    "sleep": (
        ["lying awake", "bad dreams", "waking at four", "snoring"],
        ["keep a sleep diary", "leave out coffee", "go to bed at one hour"],
    ),
    "stomach": (
        ["heartburn", "nausea", "cramps after meals", "a bloated belly"],
        ["eat small meals", "note each meal", "drink more water"],
    ),
    "joints": (
        ["a stiff knee", "aching hands", "back pain", "a swollen wrist"],
        ["cool the joint", "see the physiotherapist", "take an image of the joint"],
    ),
}
#: how strong -> what it adds to the urgency
_STRENGTH = {"slight": 0.5, "some": 1.0, "moderate": 2.0, "strong": 3.5, "unbearable": 5.0}
_DRUGS = ["Arvelin", "Botrane", "Calmexa", "Dorvium", "Elpasol", "Fentrix"]
_OWN_DRUGS = {
    "north": ["Nordal", "Nubrex"],
    "south": ["Solvane", "Sutril"],
    "east": ["Estavin", "Elmoxa"],
    "west": ["Westor", "Wabrin"],
}
_FREQUENT = {
    "north": ["heart", "lungs"],
    "south": ["skin", "stomach"],
    "east": ["sleep", "heart"],
    "west": ["joints", "stomach"],
}
#: each clinic's ways to say that there is something, that a drug is taken, and since when
_SAID = {
    "north": (
        ["Reports {strength} {felt}.", "Patient has {strength} {felt}."],
        "On {drug} {dose}.",
        "Since {days} days.",
    ),
    "south": (
        ["Comes in with {felt}, {strength}.", "{felt} again, {strength} this time."],
        "Takes {drug}, {dose} daily.",
        "It began {days} days ago.",
    ),
    "east": (
        ["Complains of {felt} ({strength}).", "Today {felt} ({strength})."],
        "Rx: {drug} {dose}.",
        "Duration: {days} d.",
    ),
    "west": (
        ["We saw {strength} {felt}.", "There was {strength} {felt} at the visit."],
        "{drug} was given at {dose}.",
        "For {days} days now.",
    ),
}
_ADVICE = ["Plan: {advice}.", "To do: {advice}.", "Advice: {advice}."]
_CALM = ["All else is fine.", "No other findings.", "Comes back in a month.", "Slept well."]

CLINICS = tuple(_SAID)
EACH = 300  # notes of a clinic


def notes() -> Iterator[dict[str, Any]]:
    """Each note: "text", "topics" (a list), "spans" (start, end, label), "urgency", "days" and
    "clinic".
    """
    for clinic in CLINICS:
        draw = random.Random(f"notes of {clinic}")
        for _ in range(EACH):
            yield _note(clinic, draw)


def _note(clinic: str, draw: random.Random) -> dict[str, Any]:
    topics = _topics(clinic, draw)
    strengths = [draw.choice(list(_STRENGTH)) for _ in topics]
    days = draw.choice([1, 2, 3, 5, 7, 10, 14, 21])
    note = _Note()
    begins, taken, since = _SAID[clinic]
    for topic, strength in zip(topics, strengths, strict=True):
        felt, _ = _TOPICS[topic]
        note.say(draw.choice(begins), strength=strength, felt=(draw.choice(felt), "SYMPTOM"))
    if draw.random() < 0.7:
        drug = draw.choice([*_DRUGS, *_OWN_DRUGS[clinic] * 3])
        amount = f"{draw.choice([5, 10, 20, 40, 80])} {draw.choice(['mg', 'ml'])}"
        note.say(taken, drug=(drug, "DRUG"), dose=(amount, "DOSE"))
    note.say(since, days=str(days))
    if topics:
        _, advised = _TOPICS[draw.choice(topics)]
        note.say(draw.choice(_ADVICE), advice=draw.choice(advised))
    else:
        note.say(draw.choice(_CALM))
    worst = max((_STRENGTH[each] for each in strengths), default=0.0)
    urgency = worst + 0.5 * len(topics) + 2.0 / days**0.5
    return {
        "text": note.text,
        "topics": sorted(topics),
        "spans": note.spans,
        "urgency": round(min(10.0, urgency), 2),
        "days": days,
        "clinic": clinic,
    }


def _topics(clinic: str, draw: random.Random) -> list[str]:
    """None to three topics, a clinic's own more often."""
    found: list[str] = []
    for _ in range(draw.choice([0, 1, 1, 1, 2, 2, 3])):
        topic = draw.choice([*_TOPICS, *_FREQUENT[clinic] * 3])
        if topic not in found:
            found.append(topic)
    return found


class _Note:
    """A text that grows by sentences, and the entities in it."""

    def __init__(self) -> None:
        self.text = ""
        self.spans: list[dict[str, Any]] = []

    def say(self, template: str, **filled: str | tuple[str, str]) -> None:
        """Add a sentence; a pair is a text and what kind of entity it is."""
        if self.text:
            self.text += " "
        for number, part in enumerate(template.split("{")):
            rest = part
            if number:
                name, _, rest = part.partition("}")
                self._put(filled[name])
            self.text += rest

    def _put(self, value: str | tuple[str, str]) -> None:
        start = len(self.text)
        if isinstance(value, str):
            self.text += value
            return
        words, kind = value
        self.text += words
        self.spans.append({"start": start, "end": len(self.text), "label": kind})
