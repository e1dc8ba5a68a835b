"""The data sets that need no hub: read out of the assets, as rows with named columns."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedgrove.federation.drawings import photos, quickdraw
from fedgrove.federation.instructions import natural_instructions
from fedgrove.federation.readers import Row

#: file of the asset "sentiment" -> its natural domain
DOMAINS = {
    "tweets_GroundTruth.txt": "tweets",
    "amazonReviewSnippets_GroundTruth.txt": "amazon",
    "movieReviewSnippets_GroundTruth.txt": "films",
    "nytEditorialSnippets_GroundTruth.txt": "nyt",
}


def sentiment(folder: Path) -> list[Row]:
    """The four-domain sentences of Hutto & Gilbert (ICWSM 2014) as ``{"text", "label", "domain"}``.

    Classes by the mean of the human ratings on −4..4: negative below −0.5, positive above 0.5,
    neutral between. A sentence that occurs again (white space aside) is dropped, so that none
    stands on both sides of a split.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for file, domain in DOMAINS.items():
        for line in (folder / file).read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            _, rating, raw = line.split("\t")
            text = " ".join(html.unescape(raw).split())
            if text and text not in seen:
                seen.add(text)
                mean = float(rating)
                label = "negative" if mean < -0.5 else "positive" if mean > 0.5 else "neutral"
                rows.append({"text": text, "label": label, "domain": domain})
    return rows


#: what BIG-bench's answers mean, where the words alone do not say
ANSWERS = {
    "evidence": {"True": "supported", "False": "refuted", "Neither": "not enough evidence"},
    "claims": {"true": "true", "false": "false"},
}


def nlu_tasks(folder: Path) -> list[Row]:
    """Four tasks of two kinds as ``{"text", "pair", "label", "task"}``; ``pair`` is "" where a row
    has one text.

    ``evidence``: does the evidence support the claim (VitaminC, pairs)? ``claims``: is the claim
    true (FEVER, no evidence)? ``hotels`` and ``medicine``: the sentiment of a sentence of a review
    (MultiEmo). Rows that occur again within a task are dropped.
    """
    rows: list[Row] = []
    for task in ("evidence", "claims", "hotels", "medicine"):
        seen: set[str] = set()
        for example in json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))[
            "examples"
        ]:
            scores = example["target_scores"]
            answer = max(scores, key=scores.get)
            text, pair = example["input"], ""
            if task == "evidence":
                text, _, pair = example["input"].rpartition("\nClaim:")
            elif task == "claims":
                text = example["input"].partition("was made:")[2].rpartition("\nQ:")[0]
            text, pair = " ".join(text.split()), " ".join(pair.split())
            if text and text + "\0" + pair not in seen:
                seen.add(text + "\0" + pair)
                rows.append(
                    {
                        "text": text,
                        "pair": pair,
                        "label": ANSWERS.get(task, {}).get(answer, answer),
                        "task": task,
                    }
                )
    return rows


@dataclass(frozen=True)
class Embedded:
    """One embedded data set: its asset, and how the asset's files become rows."""

    asset: str
    read: Callable[[Path], Iterable[Row]]
    task: str = "classify-text"


EMBEDDED = {
    "sentiment": Embedded("sentiment", sentiment),
    "nlu-tasks": Embedded("nlu-tasks", nlu_tasks),
    "natural-instructions": Embedded("natural-instructions", natural_instructions, "generate"),
    "photos": Embedded("photos", photos, "classify-images"),
    "quickdraw": Embedded("quickdraw", quickdraw, "classify-images"),
}
