"""A language model's adapter as vLLM loads it: one rank and one scale at all sites, no head.

vLLM (``vllm/lora/peft_helper.py``) reads ``r`` and ``lora_alpha`` of PEFT's configuration and passes
over ``rank_pattern`` and ``alpha_pattern``; it refuses ``modules_to_save``, DoRA, and a rank above its
``max_lora_rank``, which is one of ``RANKS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.nn.functional import pad

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.federation.tasks import TASKS
from fedgrove.ground.errors import RunError
from fedgrove.interop import peft

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write_even(source: Path, out: Path) -> int:
    """Write the adapter directory ``source`` to ``out`` with one rank and one scale; the update is
    the same. Returns the ``max_lora_rank`` that it needs. Raises ``RunError`` for what vLLM does
    not load.
    """
    card = peft.read_json(source / peft.CARD)
    if "why" in card:
        raise RunError(f"{source.name} cannot be served by vLLM: {card['why']}")
    if not TASKS.find(card["task"]).writes:
        raise RunError(
            f"{source.name} is a classifier, and vLLM takes no adapter with a head; --to vllm is "
            'for language models (data.task = "generate"), --merge writes a whole model.'
        )
    if card["head"] == "seq2seq":
        raise RunError(
            f"{source.name} is an adapter of an encoder-decoder, and vLLM takes those of decoders; "
            "--merge writes a whole model."
        )
    adapter, _, config = peft.read_adapter(source)
    even_adapter = even(adapter)
    rank = next(iter(even_adapter.values())).rank
    needed = next((each for each in RANKS if each >= rank), None)
    if needed is None:
        raise RunError(
            f"{source.name} has rank {rank}, above vLLM's largest max_lora_rank; add --rank "
            f"{RANKS[-1]} or less, the best approximation, whose error is told."
        )
    card = {key: value for key, value in card.items() if key not in ("tiers", "same_weights_as")}
    peft.rewrite(
        out,
        even_adapter,
        {},
        {**config, "modules_to_save": None},
        card=card,
    )
    return needed


def even(adapter: Mapping[str, Factors]) -> Adapter:
    """The same update with one rank, by modules of zeros, and one scale, folded into B where scales
    differ.
    """
    rank = max(factors.rank for factors in adapter.values())
    scales = {factors.scale for factors in adapter.values()}
    found: Adapter = {}
    for site, factors in adapter.items():
        b, scale = factors.B, factors.scale
        if len(scales) > 1:
            b, scale = factors.B * factors.scale, 1.0
        more = rank - factors.rank
        found[site] = Factors(pad(factors.A, (0, 0, 0, more)), pad(b, (0, more)), scale)
    return found
