"""A client's last day: base, personal and tuned measures on its own test split, and its adapter
directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.adapters.assembly import Assembly, Term, all_parameters, as_one_adapter
from fedgrove.adapters.private import unseal
from fedgrove.engines.base import Leaving, Parts
from fedgrove.ground.names import folder_of
from fedgrove.interop.assembly_file import needs_own_format, save_assembly, why
from fedgrove.interop.peft import save_adapter
from fedgrove.methods.protocols import tiers as tiers_of
from fedgrove.training.base_line import base_measure

if TYPE_CHECKING:
    from fedgrove.federation.tasks import Task
    from fedgrove.federation.tasks.base import Example
    from fedgrove.interop.models import Base
    from fedgrove.job import Job
    from fedgrove.methods.contract import ClientInfo, Method
    from fedgrove.methods.head import HeadPolicy
    from fedgrove.training.client import ClientHalf, Store


@dataclass(frozen=True, eq=False)
class _Parts:
    job: Job
    base: Base
    task: Task
    method: Method
    head: HeadPolicy


def leave(
    job: Job,
    half: ClientHalf,
    info: ClientInfo,
    data: Mapping[str, Sequence[Example]],
    offer: Mapping[str, Any],
    store: Store,
    adapters: Path,
    *,
    held_out: bool,
    keep_texts: bool = False,
) -> Leaving:
    """Measure the client and write ``adapters/NAME`` (and ``adapters_tuned/NAME`` beside
    ``adapters``).

    ``keep_texts``: also tell what a language model wrote on the client's test rows, which are the
    client's own texts.
    ``metric`` of a held-out client is that of the model it is welcomed with, before any training of
    its own.
    """
    kernel, metric = half.kernel, half.kernel.task.metric
    parts = _Parts(job, kernel.base, kernel.task, half.method, half.head)
    base = base_measure(
        kernel, half.head.initial, data["train"], data["test"],
        rounds=job.run.rounds, client=info.name, seed=job.run.seed,
    )  # fmt: skip
    assembly = half.personal(info, offer, store)
    texts: list[dict[str, Any]] = []
    final = half.measure(info.name, assembly, data["test"], texts if keep_texts else None)
    tuned = None
    guard = half.guard(info, store)
    told = None if guard is None else guard.report(job.privacy, info.examples)
    if job.train.final_local_epochs:
        penalty = half.penalty(info, offer, store)
        better = half.tune(
            info, assembly, data["train"], job.train.final_local_epochs, penalty, guard
        )
        tuned = kernel.evaluate(half.deployed(better), data["test"])[metric]
        more = None if guard is None else guard.report(job.privacy, info.examples)
        write_adapter(
            parts,
            adapters.parent / "adapters_tuned" / folder_of(info.name),
            better,
            client=info.name,
            privacy=more,
        )
    write_adapter(parts, adapters / folder_of(info.name), assembly, client=info.name, privacy=told)
    row = {
        "metric_base": base[metric],
        "metric": final[metric],
        "metric_tuned": tuned,
        "loss": final["loss"],
    }
    if guard is not None:
        spent = guard.report(job.privacy, info.examples)  # the tuned model's steps are in it
        row |= {"epsilon": spent["epsilon"], "delta": spent["delta"]}
    return Leaving(
        row=row,
        stored=all_parameters(assembly),
        artefacts={} if held_out else half.artefacts(info, offer, store),
        texts=[{"client": info.name, **text} for text in texts],
    )


def write_adapter(
    prepared: Parts,
    folder: Path,
    assembly: Assembly,
    *,
    client: str | None,
    privacy: Mapping[str, Any] | None = None,
) -> None:
    """One standard PEFT directory; several terms become one adapter by exact concatenation.

    Where the mix depends on the input there is no such adapter: then our own format
    (``interop.assembly_file``).
    """
    base, job = prepared.base, prepared.job
    named = tiers_of(prepared.method)
    tiers = {term.name: rank_of(term) for term in assembly.terms if term.name in named}
    card: dict[str, Any] = {
        "format": 1,
        **prepared.task.card(),
        "model": base.name,
        "revision": job.model.revision,
        "head": base.head,
        "dtype": job.train.dtype,
        "method": job.method.name,
        "client": client,
        **({"tiers": tiers} if tiers else {}),  # rank of each, in the order of the concatenation
        **({"privacy": dict(privacy)} if privacy else {}),  # the client's own example-level budget
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    if needs_own_format(assembly):
        save_assembly(
            folder,
            assembly,
            card={**card, "peft": False, "why": why(assembly, prepared.method.title)},
        )
        return
    save_adapter(
        folder,
        as_one_adapter(assembly, base.sites),
        base=base.upstream,
        head={name: unseal(value) for name, value in prepared.head.after(assembly).items()},
        head_kind=base.head,
        head_modules=base.head_modules,
        card=card,
    )


def rank_of(term: Term) -> int:
    return next(iter(term.adapter.values())).rank
