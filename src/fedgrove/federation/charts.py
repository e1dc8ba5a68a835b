"""Charts of four made-up clinics with questions about them: several notes (``federation.notes``) one
after the other, each under the day of its visit; the same for everybody, and nobody's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from fedgrove.federation.notes import CLINICS, notes

EACH = 300  # questions of a clinic
VISITS = 3  # the most notes of a chart

_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
#: what is asked of a visit, by the kind of entity that answers it
_ASKED = {
    "SYMPTOM": ["What was found on {day}?", "Which complaint was noted on {day}?"],
    "DRUG": ["Which drug was taken on {day}?", "What was prescribed on {day}?"],
    "DOSE": ["How much of the drug was taken on {day}?", "At what dose on {day}?"],
}


def charts() -> Iterator[dict[str, Any]]:
    """Each question: "question", "context", "answers" (one object with text and start; none where the
    visit does not say) and "clinic".
    """
    by_clinic: dict[str, list[dict[str, Any]]] = {clinic: [] for clinic in CLINICS}
    for note in notes():
        by_clinic[note["clinic"]].append(note)
    for clinic, own in by_clinic.items():
        draw = random.Random(f"charts of {clinic}")
        yield from islice(_questions(clinic, own, draw), EACH)


def _questions(
    clinic: str, own: list[dict[str, Any]], draw: random.Random
) -> Iterator[dict[str, Any]]:
    while True:
        visits = draw.sample(own, draw.randint(1, VISITS))
        days = draw.sample(_DAYS, len(visits))
        text, places = _chart(visits, days)
        number = draw.randrange(len(visits))
        kind = draw.choice(list(_ASKED))
        spans = [span for span in visits[number]["spans"] if span["label"] == kind]
        if len(spans) > 1:  # which of two complaints was meant, nobody knows
            continue
        answers = []
        for span in spans:
            start = places[number] + span["start"]
            answers.append({"text": text[start : places[number] + span["end"]], "start": start})
        yield {
            "question": draw.choice(_ASKED[kind]).format(day=days[number]),
            "context": text,
            "answers": answers,
            "clinic": clinic,
        }


def _chart(visits: list[dict[str, Any]], days: list[str]) -> tuple[str, list[int]]:
    """The notes under their days, and where each begins."""
    text = ""
    places: list[int] = []
    for note, day in zip(visits, days, strict=True):
        text += f"{day}: "
        places.append(len(text))
        text += f"{note['text']} "
    return text.strip(), places
