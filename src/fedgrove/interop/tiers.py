"""One tier of a client's adapter as a PEFT directory of its own.

An adapter of several terms is their exact concatenation, term after term; ``fedgrove.json`` says
how many ranks of it each tier has. So a tier is a slice: rows of every A, columns of every B. The
tiers' updates add up to the whole.
"""

from __future__ import annotations

from pathlib import Path

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.ground.errors import RunError
from fedgrove.interop import peft


def write_tier(
    source: Path,
    out: Path,
    tier: str,
) -> None:
    """Write the tier ``tier`` of the adapter directory ``source`` to ``out``, with the same head.

    Raises ``RunError`` where the adapter has no such tier.
    """
    card = peft.read_json(source / peft.CARD)
    tiers: dict[str, int] = card.get("tiers", {})
    if not tiers:
        raise RunError(
            f"{source} has no tiers (its method, {card.get('method')}, has none); leave --tier out."
        )
    if tier not in tiers:
        raise RunError(f"{source} has no tier '{tier}'; it has {', '.join(tiers)}.")
    adapter, head, config = peft.read_adapter(source)
    names = list(tiers)
    first = sum(tiers[name] for name in names[: names.index(tier)])
    card = {key: value for key, value in card.items() if key != "same_weights_as"}
    part = _slice(adapter, first, first + tiers[tier])
    peft.rewrite(
        out,
        part,
        head,
        config,
        card={**card, "tiers": {tier: tiers[tier]}},
    )


def _slice(
    adapter: Adapter,
    first: int,
    last: int,
) -> Adapter:
    return {
        site: Factors(f.A[first:last], f.B[:, first:last], f.scale) for site, f in adapter.items()
    }
