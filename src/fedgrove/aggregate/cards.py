"""What ``fedgrove aggregate`` says of what it wrote: ``README.md`` of the whole and of each adapter,
as model hubs have it, and our card, ``fedgrove.json``, where the clients have one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgrove.aggregate.inputs import Source
from fedgrove.aggregate.saved import Common
from fedgrove.aggregate.writer import write_json
from fedgrove.interop.peft import CARD, CONFIG, HEAD, read_json

README = "README.md"
#: what a client's card says of that client's own directory, and no longer holds of a mean
_OWN = ("client", "head", "privacy", "tiers", "same_weights_as", "truncated", "merged")


def shared_card(sources: Sequence[Source]) -> dict[str, Any]:
    """What the cards of all clients say alike; {} where one has none."""
    cards = [source.card() for source in sources]
    found = {
        key: value
        for key, value in cards[0].items()
        if key not in _OWN and all(card.get(key) == value for card in cards)
    }
    if any(card.get("head_trained") is False for card in cards):
        found["head_trained"] = False
    if not all(cards) or "task" not in found:
        return {}
    return found


def write_cards(
    folder: Path,
    names: Sequence[str],
    sources: Sequence[Source],
    common: Common,
    record: Mapping[str, Any],
) -> None:
    """The files beside the adapters ``names`` in ``folder``; ``record`` is ``aggregate.json``."""
    card = shared_card(sources)
    for name in names:
        if card:
            write_json(folder / name / CARD, card)
        base = read_json(folder / name / CONFIG).get("base_model_name_or_path")
        text = _adapter_text(name, base, common, record, card.get("labels"))
        (folder / name / README).write_text(text, encoding="utf-8")
    (folder / README).write_text(_report_text(names, record), encoding="utf-8")


def _adapter_text(
    name: str,
    base: str | None,
    common: Common,
    record: Mapping[str, Any],
    labels: Sequence[str] | None,
) -> str:
    said = [f"# {name}", "", _made(record), ""]
    if common.in_head:
        said.append(f"Its head is `{HEAD}`: the clients' mean.")
    elif common.in_adapter:
        names = ", ".join(f"`{each}`" for each in common.in_adapter)
        said.append(f"Beside the LoRA it has the clients' mean of {names}.")
    else:
        said.append("It has no head and no other module beside the LoRA.")
    if labels:
        said.append(f"Its classes, in their order: {', '.join(map(str, labels))}.")
    said += ["", "```python", "import fedgrove as fg", "", f"model = fg.load({json.dumps(name)})"]
    front = ["---", f"base_model: {json.dumps(base, ensure_ascii=False)}", "library_name: peft"]
    return "\n".join([*front, "tags:", "- lora", "---", "", *said, "```", ""])


def _report_text(names: Sequence[str], record: Mapping[str, Any]) -> str:
    said = ["# One round of aggregation", "", _made(record), "", "| client | share |", "|---|---|"]
    for client, share in zip(record["clients"], record["weights"], strict=True):
        said.append(f"| {client} | {share:.4g} |")
    said += ["", *(f"- {note}" for note in record["notes"])]
    if record["notes"]:
        said.append("")
    written = ", ".join(f"`{name}`" for name in names)
    said.append(f"Written: {written}; `noise.json` has what the mean lost, site by site.")
    return "\n".join([*said, ""])


def _made(record: Mapping[str, Any]) -> str:
    count = len(record["clients"])
    return (
        f"Round {record['round']} of `{record['method']}` over {count} LoRA adapters, by "
        "`fedgrove aggregate`."
    )
