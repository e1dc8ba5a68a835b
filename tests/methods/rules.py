"""What the tests of the aggregation methods share: badly scaled input, dense sums, a run on the
tiny model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stops import StopAfter
from tests.tiny import GOOD, sentences, tiny_job
from torch import Tensor

import fedgrove as fg
from fedgrove.adapters import Adapter, Assembly, Factors, Site, as_one_adapter
from fedgrove.engines.local import prepare
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import ClientInfo, Method, Setting, Update
from fedgrove.methods.registry import method_class
from fedgrove.runs.loop import Loop
from fedgrove.runs.records import Records
from fedgrove.start import run
from fedgrove.tracking.callback import Callback
from fedgrove.tracking.metrics import read

SITES = {"q": Site("q", 0, 9, 7), "v": Site("v", 1, 6, 8)}  # in, out
RANKS = (2, 4, 1, 3)
EXAMPLES = (5, 40, 17, 9)
WEIGHTS = [n / sum(EXAMPLES) for n in EXAMPLES]
CLIENTS = [
    ClientInfo(f"c{n}", rank, count)
    for n, (rank, count) in enumerate(zip(RANKS, EXAMPLES, strict=True))
]
ONE = 4 * (32 + 32)  # numbers of one module at all four sites of the tiny model
TEXTS = [row["text"] for row in sentences(9, seed=99)] + [GOOD[0]]


def method(
    name: str, scaling: Any = "global", rank: int = 4, sites: Any = SITES, **options: Any
) -> Any:
    setting = Setting(sites=sites, rank=rank, alpha=5.0, rounds=3, seed=3, scaling=scaling)
    chosen = method_class(name)
    return chosen(chosen.Options(**options), setting)


def draw(
    seed: int, rank: int, scale: float = 1.25, stretch: float = 1.0, dtype: Any = torch.float64
) -> Adapter:
    """A random adapter whose A is ``stretch`` times as long as its B is short, and as long again at
    the second site.
    """
    noise = generator(seed, "adapter")
    result = {}
    for number, (name, site) in enumerate(SITES.items(), start=1):
        a = stretch**number * torch.randn(
            rank, site.in_features, generator=noise, dtype=torch.float64
        )
        b = torch.randn(site.out_features, rank, generator=noise, dtype=torch.float64) / stretch
        result[name] = Factors(a.to(dtype), b.to(dtype), scale)
    return result


def client_draws(
    chosen: Method, stretch: float = 30.0, ranks: Sequence[int] = RANKS
) -> list[Adapter]:
    """One adapter per client, at its own scale; the lengths differ by orders of magnitude."""
    return [
        draw(n + 1, r, chosen.setting.scale(r), stretch ** (n - 1)) for n, r in enumerate(ranks)
    ]


def updates(content: Sequence[dict[str, Any]]) -> list[Update]:
    return [Update(f"c{n}", EXAMPLES[n], each) for n, each in enumerate(content)]


def sent(adapters: Sequence[Adapter]) -> list[Update]:
    return updates([{"adapter": adapter} for adapter in adapters])


def dense(adapters: Sequence[Adapter], weights: Sequence[float], site: str) -> Tensor:
    """``sum_i p_i s_i B_i A_i``, one client at a time."""
    total = torch.zeros(SITES[site].out_features, SITES[site].in_features, dtype=torch.float64)
    for adapter, weight in zip(adapters, weights, strict=True):
        f = adapter[site]
        for j in range(f.rank):
            total += weight * f.scale * torch.outer(f.B[:, j].double(), f.A[j].double())
    return total


def model(assembly: Assembly, site: str) -> Tensor:
    """The dense update that an assembly computes at a site."""
    return as_one_adapter(assembly, SITES)[site].product().double()


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    """Equal to ``tolerance`` of the norm of what is wanted."""
    assert (got - want).norm() <= tolerance * want.norm(), float((got - want).norm() / want.norm())


def adapter_files(path: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted(path.glob("adapters*/**/*"))
        if f.is_file()
    }


def lines(path: Path, split: str) -> list[dict[str, Any]]:
    found = [line for line in read(path / "metrics.jsonl") if line["split"] == split]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def small_job(name: str, bert: Path, silos: Path, /, **changes: Any) -> Any:
    """Two rounds of three clients of ranks 2, 4 and 3 (or 4 each) with two sampled in a round."""
    mixed = method_class(name).ranks == "mixed"
    federation = {
        "fraction": 0.7,
        **({"ranks": [2, 4, 3]} if mixed else {}),
        **changes.pop("federation", {}),
    }
    return tiny_job(
        bert,
        silos,
        method={"name": name, **changes.pop("method", {})},
        federation=federation,
        lora={"rank": 4, **changes.pop("lora", {})},
        train={"final_local_epochs": 1, "local_steps": 2, **changes.pop("train", {})},
        run={"rounds": 2, **changes.pop("run", {})},
    )


def check_run(job: Any, tmp_path: Path) -> Path:
    """Run the job; stop and resume it; reload what it exported. All must agree. Gives the run's
    directory.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(job, whole)
    for stop in range(1, job.run.rounds + 1):
        with pytest.raises(KeyboardInterrupt):
            run(job, cut, resume=True, callbacks=[StopAfter(stop)])
    run(job, cut, resume=True)
    assert adapter_files(whole) == adapter_files(cut)
    for split in ("train", "test"):
        assert lines(whole, split) == lines(cut, split)
    check_export(job, whole)
    return whole


def check_export(job: Any, out: Path) -> None:
    """What is exported gives the logits of the personal models as the method runs them, term by
    term.
    """
    prepared = prepare(job)
    loop = Loop(prepared, Records.at(out, Callback()))
    assert loop.done == job.run.rounds
    kernel = prepared.engine.half.kernel
    examples = prepared.task.encode(
        [{"text": text, "label": "positive"} for text in TEXTS], prepared.base.processor
    )
    for name in prepared.clients:
        assembly = prepared.engine.personal(name, loop.deployed(name, loop.done))
        bare = Assembly(extras=assembly.extras)
        ours, without = kernel.logits(assembly, examples), kernel.logits(bare, examples)
        assert (ours - without).abs().max() > 1e-4  # there is something to export
        assert (fg.load(out / "adapters" / name).logits(TEXTS) - ours).abs().max() <= 1e-5
