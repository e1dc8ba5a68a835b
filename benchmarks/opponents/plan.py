"""The same work for everyone: clients, encoded examples, batches, first adapter and heads, written
out once.

``write`` asks Fedgrove for them (data, splits, data order, initial draws); the opponents read plain
files and share no code with Fedgrove.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgrove.job import Job


def write(job: Job, folder: Path) -> dict[str, Any]:
    """Write ``plan.json`` and ``start.safetensors`` of a FedIT job into ``folder``; give back the
    plan.
    """
    from safetensors.torch import save_file

    from fedgrove.engines.local import prepare
    from fedgrove.ground.seeds import generator
    from fedgrove.interop.models import resolve_name
    from fedgrove.methods.contract import Step
    from fedgrove.training.loop import batch_order

    prepared = prepare(job)
    job, train = prepared.job, prepared.job.train
    if job.method.name != "fedit" or train.accumulation != 1 or job.lora.dropout:
        raise SystemExit(
            "the opponents are FedAvg of plain PEFT: use method fedit, accumulation 1, no dropout"
        )
    state = prepared.method.begin(list(prepared.clients.values()))
    adapter = state["global"]
    scale = next(iter(adapter.values())).scale
    rank = next(iter(adapter.values())).rank
    start = {
        f"{site}.{letter}": getattr(f, letter).contiguous()
        for site, f in adapter.items()
        for letter in "AB"
    }
    start |= {f"head.{name}": value.contiguous() for name, value in prepared.head.initial.items()}
    clients: dict[str, Any] = {}
    for name in prepared.clients:
        data = prepared.engine.data[name]
        steps = prepared.engine.half.kernel.steps(
            Step(prepared.method.global_assembly(state)), len(data["train"])
        )
        batches = []
        for number in range(1, job.run.rounds + 1):
            draws = batch_order(
                len(data["train"]),
                train.batch_size,
                generator(job.run.seed, number, name, "train", "order"),
            )
            batches.append([next(draws) for _ in range(steps)])
        clients[name] = {split: [_plain(e) for e in data[split]] for split in ("train", "test")} | {
            "batches": batches
        }
    plan = {
        "kind": "lm" if prepared.base.head == "lm" else "classify",
        "model": resolve_name(job.model.name),
        "pad": prepared.base.pad_id,
        "targets": sorted(adapter),
        "rank": rank,
        "alpha": scale * rank,
        "lr": train.lr,
        "clip": train.clip,
        "eval_batch": train.eval_batch_size,
        "rounds": job.run.rounds,
        "clients": clients,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(start, folder / "start.safetensors")
    (folder / "plan.json").write_text(json.dumps(plan))
    prepared.engine.half.kernel.close()
    return plan


def tokens(plan: dict[str, Any]) -> tuple[int, int]:
    """Real tokens, padding not counted: (trained in a round, the mean over rounds; evaluated in a
    round).
    """
    trained = evaluated = 0
    for client in plan["clients"].values():
        lengths = [len(example["input_ids"]) for example in client["train"]]
        trained += sum(
            lengths[index] for round in client["batches"] for batch in round for index in batch
        )
        evaluated += sum(len(example["input_ids"]) for example in client["test"])
    return trained // plan["rounds"], evaluated


def _plain(example: dict[str, Any]) -> dict[str, Any]:
    found = {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in example.items()
    }
    if "start" in found:  # a text to learn: the tokens of its completion
        start = found["start"]
        found["labels"] = [-100] * start + found["input_ids"][start:]
    return found
