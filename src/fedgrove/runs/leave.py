"""A client's last day: base, personal and tuned measures on its own test split, and its adapter
directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.adapters.assembly import Assembly, Term, all_parameters, as_one_adapter
from fedgrove.adapters.lowrank import lean
from fedgrove.adapters.private import unseal
from fedgrove.federation.tasks.base import WritingTask
from fedgrove.ground.files import write_json
from fedgrove.ground.names import folder_of
from fedgrove.ground.plain import Given, Plain
from fedgrove.interop.assembly_file import needs_own_format, save_assembly, why
from fedgrove.interop.peft import save_adapter
from fedgrove.methods.protocols import tiers as tiers_of
from fedgrove.runs.engine import Leaving
from fedgrove.runs.origin import appended
from fedgrove.training.base_line import base_measure
from fedgrove.training.measured import measured, written

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Example
    from fedgrove.methods.contract import ClientInfo
    from fedgrove.privacy.example_dp import ExampleGuard
    from fedgrove.runs.parts import Parts
    from fedgrove.training.client import ClientHalf, Store
    from fedgrove.training.readers import Found

MEASURES = "measures.json"


def leave(
    parts: Parts,
    half: ClientHalf,
    info: ClientInfo,
    data: Mapping[str, Sequence[Example]],
    offer: Given,
    store: Store,
    adapters: Path,
    *,
    held_out: bool,
    keep_texts: bool = False,
    measure: bool = True,
) -> Leaving:
    """Measure the client and write ``adapters/NAME`` (and ``adapters_tuned/NAME`` beside
    ``adapters``).

    Args:
        half: of these parts, on the kernel that does the work.
        keep_texts: also tell what a language model wrote on the client's test rows, which are the
            client's own texts.
        measure: else the row's measures are None, and no ``measures.json`` is written.

    ``metric`` of a held-out client is that of the model it is welcomed with, before any training of
    its own.
    """
    job, metric = parts.job, parts.task.metric
    epochs = job.train.final_local_epochs
    guard = half.guard(info, store)
    row: Plain = dict.fromkeys(("metric_base", "metric", "metric_tuned", "loss"))
    if measure:
        row["metric_base"] = base_metric(parts, half, info, data)
    assembly = half.personal(info, offer, store)
    found: Found = {}
    if measure:
        final = half.measure(info.name, assembly, data["test"], found)
        row |= {"metric": final[metric], "loss": final["loss"]}
    told = spending(parts, info, guard)

    def left(place: Path, model: Assembly, answers: Found) -> None:
        """The client's directory in ``place``, with the measures of what its model answered."""
        folder = place / folder_of(info.name)
        write_adapter(parts, folder, model, client=info.name, privacy=told)
        note_measures(parts, folder, answers, data["test"])

    left(adapters, assembly, found)
    if epochs:
        penalty = half.penalty(info, offer, store)
        better = half.tune(
            info,
            assembly,
            data["train"],
            epochs,
            penalty,
            guard,
        )
        again: Found = {}
        if measure:
            exported = half.deployed(better)
            row["metric_tuned"] = half.kernel.evaluate(exported, data["test"], again)[metric]
        told = spending(parts, info, guard)
        left(adapters.parent / "adapters_tuned", better, again)
    if told is not None:  # the tuned model's steps are in it
        row |= {"epsilon": told["epsilon"], "delta": told["delta"]}
    texts: list[Plain] = []
    if keep_texts:
        texts = texts_of(parts, info.name, found, data["test"])
    return Leaving(
        row=row,
        stored=all_parameters(assembly),
        artefacts={} if held_out else half.artefacts(info, offer, store),
        texts=texts,
    )


def texts_of(
    parts: Parts,
    client: str,
    found: Found,
    examples: Sequence[Example],
) -> list[Plain]:
    """What a language model wrote, beside what it was asked; [] of others."""
    if not isinstance(parts.task, WritingTask):
        return []
    chosen = [examples[number] for number in sorted(found)]
    return [{"client": client, **line} for line in parts.task.shown(written(found), chosen)]


def note_measures(
    parts: Parts,
    folder: Path,
    found: Found,
    examples: Sequence[Example],
) -> None:
    """``measures.json`` beside an adapter: its model by every metric of the task and the job, on
    the client's test rows, whose answers are ``found``. It stays with the client.
    """
    if told := measured(parts.task, found, examples, parts.job.data.metrics):
        write_json(folder / MEASURES, {"test": told}, synced=parts.copies is None)


def base_metric(
    parts: Parts,
    half: ClientHalf,
    info: ClientInfo,
    data: Mapping[str, Sequence[Example]],
) -> float | None:
    """The metric of the untouched base with a head trained alone on the client's data.

    None under example-level privacy: to train that head would spend as much as the whole run.
    """
    if parts.job.privacy.example_level and parts.head.initial:
        return None
    measures = base_measure(
        half.kernel,
        parts.head.initial,
        data["train"],
        data["test"],
        rounds=parts.job.run.rounds,
        client=info.name,
        seed=parts.job.run.seed,
    )
    return measures[parts.task.metric]


def spending(parts: Parts, info: ClientInfo, guard: ExampleGuard | None) -> Plain | None:
    """What the work so far cost of the client's example-level budget; None where it has none."""
    if guard is None:
        return None
    return guard.report(parts.job.privacy, info.examples)


def write_adapter(
    parts: Parts,
    folder: Path,
    assembly: Assembly,
    *,
    client: str | None,
    privacy: Given | None = None,
) -> None:
    """One standard PEFT directory; several terms become one adapter by exact concatenation, which
    is compacted where it would have more modules than a site has inputs or outputs. The adapter that
    the run started from is part of it, so that it is one on the original base.

    Where the mix depends on the input there is no such adapter: then our own format
    (``interop.assembly_file``).
    """
    base, job = parts.base, parts.job
    own = needs_own_format(assembly)
    task, head = parts.task, parts.head.after(assembly)
    if not own:
        task, head = task.leaving({name: unseal(value) for name, value in head.items()})
    named = tiers_of(parts.method)
    tiers = {term.name: rank_of(term) for term in assembly.terms if term.name in named}
    card: Plain = {
        "format": 1,
        **task.card(),
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
    if own:
        begun = appended(assembly.base_delta or {}, base.start)
        save_assembly(
            folder,
            replace(assembly, base_delta=begun or None),
            card={
                **card,
                "peft": False,
                "why": why(assembly, parts.method.title),
            },
        )
        return
    trained = as_one_adapter(assembly, base.sites)
    whole = appended(trained, base.start, before=sum(tiers.values()))
    save_adapter(
        folder,
        whole if tiers else lean(whole),  # a tier is a slice of the concatenation
        base=base.upstream,
        head=head,
        head_kind=base.head,
        head_modules=base.head_modules,
        transposed=any(site.transposed for site in base.sites.values()),
        card=card,
        copies=parts.copies,
        rslora=job.lora.rslora,
    )


def rank_of(term: Term) -> int:
    return next(iter(term.adapter.values())).rank
