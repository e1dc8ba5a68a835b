"""``generations.jsonl``: a few of the texts that the clients' final models wrote, beside what was
right.
"""

from __future__ import annotations

from fedgrove.report.sections import Left, Section

SHOWN = 12  # texts on the page, spread over the clients
LONGEST = 320  # letters of a cell


def generations(left: Left) -> list[Section]:
    """The texts as a table, as many of each client as there is room for."""
    texts = left.lines("generations.jsonl")
    if not texts:
        return []
    clients: dict[str, list[dict[str, str]]] = {}
    for written in texts:
        clients.setdefault(written["client"], []).append(written)
    each = max(1, SHOWN // len(clients))
    chosen = [written for name in sorted(clients) for written in clients[name][:each]][:SHOWN]
    rows = [("client", "prompt", "written", "right")]
    rows += [
        (
            one["client"],
            short(one["prompt"]),
            short(one["output"]) or "(nothing)",
            short(one["reference"]),
        )
        for one in chosen
    ]
    said = (
        f"Greedy answers of the final personal models to test prompts: {len(chosen)} of the "
        f"{len(texts)} that "
        "generations.jsonl holds. ROUGE and exact match are measured on these texts, the loss on "
        "all test rows."
    )
    return [
        Section(
            "What the models write",
            said,
            table=rows,
            prose=True,
        )
    ]


def short(text: str) -> str:
    """The start and the end of a long text: instructions stand at either."""
    text = " ".join(text.split())
    half = LONGEST // 2
    if len(text) <= LONGEST:
        return text
    return f"{text[:half].rstrip()} … {text[-half:].lstrip()}"
