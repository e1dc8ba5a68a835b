"""After the last round: measures, adapters, artefacts, summary, report. Safe to repeat from the
last checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.defence.attack import SPLIT
from fedgrove.ground.ctrlc import stop_if_pressed
from fedgrove.ground.files import sync_all, write_json, write_text
from fedgrove.ground.plain import Given, Plain
from fedgrove.ground.statistics import mean
from fedgrove.interop.peft import CARD, read_json
from fedgrove.methods.protocols import ServerArtefacts, global_assembly
from fedgrove.report import write_report
from fedgrove.runs.engine import Absence, Leaving
from fedgrove.runs.leave import write_adapter
from fedgrove.runs.linked import link_equal
from fedgrove.tracking import summary as summaries
from fedgrove.training.profile import span

if TYPE_CHECKING:
    from fedgrove.runs.loop import Loop


def finish(loop: Loop, *, baselines: Sequence[Path] = ()) -> Plain:
    """Write everything that a finished run has."""
    stage = loop.prepared
    out = loop.out
    with loop.at_leaving():
        write_global(loop)  # first, because clients' equal adapters are linked to it
        with loop.ledger.clock("evaluation"):
            left = export_all(loop)
        link(loop)
        for file, content in artefacts(loop, left).items():
            write_json(out / file, content)
        write_texts(out, left)
    loop.save()  # with the seconds of the work above
    job = stage.job
    ledger = loop.ledger
    here = [name for name in stage.clients if name in left]
    summary = summaries.summarise(
        method=stage.called or job.method.name,
        task=stage.task.name,
        seed=job.run.seed,
        rounds=loop.done,
        clients=rows(loop, left),
        parameters={
            "trained": flat(ledger.trained),
            "stored": [left[name].stored for name in here],
            "sent_up": flat(ledger.up),
            "sent_down": flat(ledger.down),
        },
        bytes_up=ledger.bytes_up,
        bytes_down=ledger.bytes_down,
        seconds=ledger.seconds,
    )
    summary["metric"] = stage.task.metric
    if job.run.evaluate != "all":
        scored = [name for name in here if left[name].row["metric"] is not None]
        summary["measured"] = {"clients": len(scored), "of": len(stage.clients)}
    summary.update(loop.choice.told(loop.done))
    if said := loop.choice.sentence(loop.done):
        loop.watch.remark(said)
    if spent := privacy(loop, left):
        summary["privacy"] = spent
    if told := poison(loop, left):
        summary.update(told)
        write_json(out / "defence.json", {**told, "lines": loop.shield.lines})
    write_json(out / "summary.json", summary)
    loop.watch.phase("writing the report")
    with span("report"):
        write_report(out, baselines)  # the last file: a run is finished when it has both
    loop.watch.run_finished(summary, out)
    return summary


def rows(loop: Loop, left: Mapping[str, Leaving]) -> dict[str, Plain]:
    """A row of the summary for each client that told its measures."""
    stage = loop.prepared
    found = {}
    everyone = {**stage.clients, **stage.held_out}
    for name, info in everyone.items():
        if name in left:
            found[name] = {
                "examples": info.examples,
                "rank": info.rank,
                **left[name].row,
                "held_out": name in stage.held_out,
            }
    return found


def write_texts(out: Path, left: Mapping[str, Leaving]) -> None:
    """``generations.jsonl``, where a simulation's language models wrote something."""
    texts: list[Plain] = []
    for name in sorted(left):
        texts.extend(left[name].texts)
    if texts:
        lines = [json.dumps(text, ensure_ascii=False) for text in texts]
        write_text(out / "generations.jsonl", "\n".join(lines) + "\n")


def privacy(loop: Loop, left: Mapping[str, Leaving]) -> Plain:
    """What the run's protection came to; {} where it had none. At the example level the largest ε
    of the clients'.
    """
    section = loop.prepared.job.privacy
    found: Plain = {}
    if loop.guard is not None:
        found["client"] = loop.guard.summary(len(loop.prepared.clients))
        found["secure_aggregation"] = section.secure_aggregation
    if section.example_level:
        told = [left[name].row for name in loop.prepared.clients if name in left]
        spent = [row["epsilon"] for row in told if "epsilon" in row]
        largest = None
        if spent and None not in spent:
            largest = max(spent)
        found["example"] = {
            "noise": section.example_noise,
            "clip": section.example_clip,
            "epsilon": largest,
            "randomness": section.randomness,
        }
    return found


def poison(loop: Loop, left: Mapping[str, Leaving]) -> Plain:
    """What the defence was, and what attackers came to; {} where the job has neither."""
    stage = loop.prepared
    found: Plain = {}
    wanted, attackers = stage.job.defence, stage.attackers.names
    if wanted.active:
        found["defence"] = {"rule": wanted.rule, "norm": wanted.norm}
    if attackers:
        metric = stage.task.metric
        honest = [left[name].row["metric"] for name in left if name not in attackers]
        success: list[float] = []
        if stage.job.attack.tells:
            success = [line[metric] for line in loop.measured(loop.done, SPLIT)]
        found["attack"] = {
            "kind": stage.job.attack.kind,
            "attackers": list(attackers),
            "honest": or_none(mean(honest)),
            "success": or_none(mean(success)),
        }
    return found


def or_none(value: float) -> float | None:
    """JSON has no word for what is no number."""
    if math.isnan(value):
        return None
    return value


def export_all(loop: Loop) -> dict[str, Leaving]:
    """Every client goes home, measured and with its adapter. Those that do not answer are
    missing.
    """
    prepared = loop.prepared
    everyone = [*prepared.clients, *prepared.held_out]
    loop.watch.phase("measuring models and writing adapters", len(everyone))
    left: dict[str, Leaving] = {}
    known = set(asked(loop))
    unmeasured = [name for name in everyone if name not in known]
    for gone in prepared.engine.leave(everyone, Offers(loop), loop.out, unmeasured):
        stop_if_pressed()
        if isinstance(gone, Absence):
            loop.lost(loop.done, gone, "not measured")
        else:
            name, leaving = gone
            left[name] = leaving
        loop.watch.phase_advanced()
    return left


def asked(loop: Loop) -> list[str]:
    """Who is measured at the end: those of the last evaluation, so that nothing is computed twice,
    and as many of the held-out clients.
    """
    stage = loop.prepared
    trained = loop.asked(list(stage.clients), loop.done)
    return trained + loop.asked(list(stage.held_out), loop.done)


def artefacts(loop: Loop, left: Mapping[str, Leaving]) -> Plain:
    """The method's files: what the server knows, and merged into it what each client told of
    itself.
    """
    method = loop.prepared.method
    if isinstance(method, ServerArtefacts):
        content = method.artefacts(loop.state)
    else:
        content = {}
    for name in loop.prepared.clients:
        if name in left:
            merge(content, left[name].artefacts)
    return content


def merge(into: Plain, more: Given) -> None:
    """Add ``more`` to ``into``, dictionary by dictionary; anything else replaces what is there."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


class Offers:
    """What each client goes home with. A held-out one arrives as a newcomer does, its probe
    included, once.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        self._arrived: dict[str, Given] = {}

    def __call__(self, name: str) -> Given:
        loop = self.loop
        prepared = loop.prepared
        if name in prepared.clients:
            return loop.deployed(name, loop.leaves)
        if name not in self._arrived:
            state = loop.opened(prepared.job.run.rounds + 1)
            newcomer = prepared.held_out[name]
            welcome = prepared.parts.welcome(state, loop.head, newcomer)
            self._arrived[name] = prepared.engine.arrive(name, welcome)
        return self._arrived[name]


def write_global(loop: Loop) -> None:
    """``adapters/_global``, where the method has one model of all clients; its head is the mean, or
    the first draw, which its card says (``head_trained``).
    """
    parts = loop.prepared.parts
    assembly = global_assembly(parts.method, loop.state)
    if assembly is None:
        return
    if loop.head:
        head = {"head": dict(loop.head)}
    else:
        head = {}
    with_head = loop.prepared.head.attach(assembly, head, {})
    folder = loop.out / "adapters" / "_global"
    write_adapter(parts, folder, with_head, client=None)
    drawn = parts.head.mode == "local" and not loop.head and bool(parts.head.initial)
    if drawn:
        card = read_json(folder / CARD)
        write_json(folder / CARD, {**card, "head_trained": False})


def link(loop: Loop) -> None:
    """Keep equal adapters once, and say so."""
    adapters = loop.out / "adapters"
    if adapters.exists():
        linked = link_equal(adapters)
    else:
        linked = 0
    sync_all()  # the clients' directories, which were not synced one by one
    if linked:
        loop.watch.remark(
            f"{linked} of the adapters in {adapters} have the weights of another there and take no "
            f"room of their own (hard links; same_weights_as in fedgrove.json names it): copy one "
            f"before you change it in place."
        )


def flat(numbers: dict[str, list[int]]) -> list[int]:
    """The numbers of all clients, in name order."""
    found: list[int] = []
    for name in sorted(numbers):
        found.extend(numbers[name])
    return found
