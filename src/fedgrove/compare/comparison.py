"""A whole comparison: planned, carried out, written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.compare.campaign import carry_out
from fedgrove.compare.plan import make_plan
from fedgrove.compare.progress import Overall
from fedgrove.compare.write import write
from fedgrove.ground.plain import Plain

if TYPE_CHECKING:
    from fedgrove.job import Job


def compare(
    job: Job,
    methods: str | Iterable[str],
    seeds: str | Iterable[int],
    out: str | Path,
    *,
    tune: Sequence[str] = (),
    settings: Sequence[str] = (),
    tune_seed: int | None = None,
    progress: Overall | None = None,
) -> Plain:
    """Run every method on every seed under ``out`` and write the tables; returns the content of
    ``compare.json``.

    ``methods``: ``"fedit, fedtreelora[fixed_k=2]"``, or a list of such entries. ``tune``:
    ``["lr=1e-4,3e-4"]``. Called again with the same arguments it goes on where it stopped; with
    more methods or seeds it adds them. Raises ``FedgroveError`` for bad input before anything is
    written; ``KeyboardInterrupt`` leaves all that is done.
    """
    plan = make_plan(
        job,
        methods,
        seeds,
        out=Path(out),
        tune=tune,
        settings=settings,
        tune_seed=tune_seed,
    )
    done = carry_out(plan, progress or Overall())
    return write(done)
