"""After the last round: measures, adapters, artefacts, summary, report. Safe to repeat from the
last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.adapters.tree import typed
from fedgrove.engines.base import Absence, Leaving
from fedgrove.ground.files import write_json, write_text
from fedgrove.methods.protocols import ServerArtefacts, global_assembly
from fedgrove.report import write_report
from fedgrove.runs.leave import write_adapter
from fedgrove.tracking import summary as summaries
from fedgrove.training.profile import span

if TYPE_CHECKING:
    from fedgrove.runs.loop import Loop


_NOBODY = Leaving({}, 0, {})


def finish(loop: Loop, *, baselines: Sequence[Path] = ()) -> dict[str, Any]:
    """Write everything that a finished run has."""
    prepared, out = loop.prepared, loop.directory.path
    with loop.ledger.clock("evaluation"):
        left = farewell(loop)
    everyone = {**prepared.clients, **prepared.held_out}
    rows = {
        name: {
            "examples": info.examples,
            "rank": info.rank,
            **left[name].row,
            "held_out": name in prepared.held_out,
        }
        for name, info in everyone.items()
        if name in left
    }
    write_global(loop)
    for file, content in artefacts(loop, left).items():
        write_json(out / file, content)
    if texts := [text for name in sorted(left) for text in left[name].texts]:
        lines = [json.dumps(text, ensure_ascii=False) for text in texts]
        write_text(out / "generations.jsonl", "\n".join(lines) + "\n")
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
            "stored": [left[name].stored for name in prepared.clients if name in left],
            "sent_up": flat(ledger.up),
            "sent_down": flat(ledger.down),
        },
        bytes_up=ledger.bytes_up,
        bytes_down=ledger.bytes_down,
        seconds=ledger.seconds,
    )
    summary["metric"] = prepared.task.metric
    if spent := privacy(loop, left):
        summary["privacy"] = spent
    write_json(out / "summary.json", summary)
    loop.watch.phase("writing the report")
    with span("report"):
        write_report(out, baselines)  # the last file: a run is finished when it has both
    loop.watch.run_finished(summary, out)
    return summary


def privacy(loop: Loop, left: Mapping[str, Leaving]) -> dict[str, Any]:
    """What the run's protection came to; {} where it had none. At the example level the largest ε
    of the clients'.
    """
    section = loop.prepared.job.privacy
    found: dict[str, Any] = {}
    if loop.guard is not None:
        found["client"] = loop.guard.summary(len(loop.prepared.clients))
        found["secure_aggregation"] = section.secure_aggregation
    if section.example_level:
        spent = [
            left[name].row["epsilon"]
            for name in loop.prepared.clients
            if "epsilon" in left.get(name, _NOBODY).row
        ]
        found["example"] = {
            "noise": section.example_noise,
            "clip": section.example_clip,
            "epsilon": None if not spent or None in spent else max(spent),
            "randomness": section.randomness,
        }
    return found


def farewell(loop: Loop) -> dict[str, Leaving]:
    """Every client goes home, measured and with its adapter. Those that do not answer are
    missing.
    """
    prepared = loop.prepared
    everyone = [*prepared.clients, *prepared.held_out]
    loop.watch.phase("measuring models and writing adapters", len(everyone))
    left: dict[str, Leaving] = {}
    for gone in prepared.engine.leave(everyone, Offers(loop), loop.directory.path):
        if isinstance(gone, Absence):
            loop.lost(prepared.job.run.rounds, gone, "not measured")
        else:
            left[gone[0]] = gone[1]
        loop.watch.phase_advanced()
    return left


def artefacts(loop: Loop, left: Mapping[str, Leaving]) -> dict[str, Any]:
    """The method's files: what the server knows, and merged into it what each client told of
    itself.
    """
    method = loop.prepared.method
    content = method.artefacts(loop.state) if isinstance(method, ServerArtefacts) else {}
    for name in loop.prepared.clients:
        if name in left:
            merge(content, left[name].artefacts)
    return content


def merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
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
        self._arrived: dict[str, Mapping[str, Any]] = {}

    def __call__(self, name: str) -> Mapping[str, Any]:
        loop, prepared = self.loop, self.loop.prepared
        if name in prepared.clients:
            return loop.offer(name, prepared.job.run.rounds + 1)
        if name not in self._arrived:
            info = prepared.held_out[name]

            def ask(probe: Mapping[str, Any] | None) -> Mapping[str, Any]:
                method, state = prepared.method, loop.opened(prepared.job.run.rounds + 1)
                found = None if probe is None else typed(method.Probed, probe)
                content = method.welcome(state, info, found)
                return prepared.head.beside(content, loop.head, newcomer=True)

            self._arrived[name] = prepared.engine.arrive(name, ask)
        return self._arrived[name]


def write_global(loop: Loop) -> None:
    """``adapters/_global``, where the method has one model of all clients; its head is the mean, or
    the first draw.
    """
    assembly = global_assembly(loop.prepared.method, loop.state)
    if assembly is not None:
        head = {"head": dict(loop.head)} if loop.head else {}
        with_head = loop.prepared.head.attach(assembly, head, {})
        write_adapter(
            loop.prepared, loop.directory.path / "adapters" / "_global", with_head, client=None
        )


def flat(numbers: dict[str, list[int]]) -> list[int]:
    return [number for name in sorted(numbers) for number in numbers[name]]
