"""After the last round: measures, adapters, artefacts, summary, report. Safe to repeat from the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedgrove.adapters.assembly import Assembly, Term, all_parameters, as_one_adapter
from fedgrove.adapters.private import unseal
from fedgrove.interop.assembly_file import needs_own_format, save_assembly, why
from fedgrove.interop.peft import save_adapter
from fedgrove.report import write_report
from fedgrove.tracking import summary as summaries
from fedgrove.training.base_line import base_measure

if TYPE_CHECKING:
    from fedgrove.federation.tasks import Task
    from fedgrove.interop.models import Base
    from fedgrove.job import Job
    from fedgrove.methods.contract import Method
    from fedgrove.run import Loop
    from fedgrove.training.head import HeadPolicy


def finish(loop: Loop, *, baselines: Sequence[Path] = ()) -> dict[str, Any]:
    """Write everything that a finished run has."""
    prepared, out = loop.prepared, loop.directory.path
    rows: dict[str, dict[str, Any]] = {}
    stored: list[int] = []
    offers = Offers(loop)
    with loop.ledger.clock("evaluation"):
        measure(loop, rows, offers)
    everyone = {**prepared.clients, **prepared.held_out}
    loop.watch.phase("writing adapters", len(everyone))
    for name in everyone:
        assembly = prepared.engine.personal(name, offers(name))
        stored.append(all_parameters(assembly))
        write_adapter(prepared, out / "adapters" / name, assembly, client=name)
        loop.watch.phase_advanced()
    write_global(loop)
    for file, content in artefacts(loop).items():
        summaries.write(out / file, content)
    loop.save()  # with the seconds of the work above
    ledger, job = loop.ledger, prepared.job
    summary = summaries.summarise(
        method=job.method.name,
        task=prepared.task.name,
        seed=job.run.seed,
        rounds=job.run.rounds,
        clients=rows,
        parameters={
            "trained": flat(ledger.trained),
            "stored": stored[: len(prepared.clients)],
            "sent_up": flat(ledger.up),
            "sent_down": flat(ledger.down),
        },
        bytes_up=ledger.bytes_up,
        bytes_down=ledger.bytes_down,
        seconds=ledger.seconds,
    )
    summary["metric"] = prepared.task.metric
    summaries.write(out / "summary.json", summary)
    loop.watch.phase("writing the report")
    write_report(out, baselines)  # the last file: a run is finished when it has both
    loop.watch.run_finished(summary, out)
    return summary


def artefacts(loop: Loop) -> dict[str, Any]:
    """The method's files: what the server knows, and merged into it what each client here knows of itself."""
    prepared = loop.prepared
    content = prepared.method.artefacts(loop.state)
    for name, info in prepared.clients.items():
        offer = loop.offer(name, prepared.job.run.rounds + 1)["method"]
        merge(content, prepared.method.client_artefacts(info, offer, prepared.engine.store(name).get("mine", {})))
    return content


def merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add ``more`` to ``into``, dictionary by dictionary; anything else replaces what is there."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


class Offers:
    """What each client goes home with. A held-out one arrives as a newcomer does, its probe included, once."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self._arrived: dict[str, Mapping[str, Any]] = {}

    def __call__(self, name: str) -> Mapping[str, Any]:
        loop, prepared = self.loop, self.loop.prepared
        if name in prepared.clients:
            return loop.offer(name, prepared.job.run.rounds + 1)
        if name not in self._arrived:
            info = prepared.held_out[name]

            def ask(probe: Mapping[str, Any] | None) -> Mapping[str, Any]:
                return prepared.head.beside(prepared.method.welcome(loop.state, info, probe), loop.head, newcomer=True)

            self._arrived[name] = prepared.half.arrive(info, prepared.engine.data[name]["train"], ask)
        return self._arrived[name]


def measure(loop: Loop, rows: dict[str, dict[str, Any]], offers: Offers) -> None:
    """Base, personal and tuned measures of every client, on its own test split.

    ``metric`` of a held-out client is that of the model it is welcomed with, before any training of its own.
    """
    prepared, job = loop.prepared, loop.prepared.job
    metric, half = prepared.task.metric, prepared.half
    everyone = {**prepared.clients, **prepared.held_out}
    loop.watch.phase("measuring base and final models", len(everyone))
    for name, info in everyone.items():
        data = prepared.engine.data[name]
        base = base_measure(
            half.kernel, prepared.head.initial, data["train"], data["test"],
            rounds=job.run.rounds, client=name, seed=job.run.seed,
        )  # fmt: skip
        offer = offers(name)
        assembly = prepared.engine.personal(name, offer)
        final = half.kernel.evaluate(half.deployed(assembly), data["test"])
        tuned = None
        if job.train.final_local_epochs:
            mine = prepared.engine.store(name).get("mine", {})
            penalty = prepared.method.penalty(info, dict(offer["method"]), mine)
            better = half.tune(info, assembly, data["train"], job.train.final_local_epochs, penalty)
            tuned = half.kernel.evaluate(half.deployed(better), data["test"])[metric]
            write_adapter(prepared, loop.directory.path / "adapters_tuned" / name, better, client=name)
        rows[name] = {
            "examples": info.examples,
            "rank": info.rank,
            "metric_base": base[metric],
            "metric": final[metric],
            "metric_tuned": tuned,
            "loss": final["loss"],
            "held_out": name in prepared.held_out,
        }
        loop.watch.phase_advanced()


class Parts(Protocol):
    """What of a prepared run an adapter directory tells."""

    @property
    def job(self) -> Job: ...
    @property
    def base(self) -> Base: ...
    @property
    def task(self) -> Task: ...
    @property
    def method(self) -> Method: ...
    @property
    def head(self) -> HeadPolicy: ...


def write_adapter(prepared: Parts, folder: Path, assembly: Assembly, *, client: str | None) -> None:
    """One standard PEFT directory; several terms become one adapter by exact concatenation.

    Where the mix depends on the input there is no such adapter: then our own format (``interop.assembly_file``).
    """
    base, job = prepared.base, prepared.job
    tiers = {term.name: rank_of(term) for term in assembly.terms if term.name in prepared.method.tiers}
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
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    if needs_own_format(assembly):
        save_assembly(folder, assembly, card={**card, "peft": False, "why": why(assembly, prepared.method.title)})
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


def write_global(loop: Loop) -> None:
    """``adapters/_global``, where the method has one model of all clients; its head is the mean, or the first draw."""
    assembly = loop.prepared.method.global_assembly(loop.state)
    if assembly is not None:
        head = {"head": dict(loop.head)} if loop.head else {}
        with_head = loop.prepared.head.attach(assembly, head, {})
        write_adapter(loop.prepared, loop.directory.path / "adapters" / "_global", with_head, client=None)


def rank_of(term: Term) -> int:
    return next(iter(term.adapter.values())).rank


def flat(numbers: dict[str, list[int]]) -> list[int]:
    return [number for name in sorted(numbers) for number in numbers[name]]
