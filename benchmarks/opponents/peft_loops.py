"""Opponents without a framework: the floor, one-by-one PEFT on one base, and the base reloaded for
each client.

python peft_loops.py floor|swap|reload PLAN_FOLDER OUT.json [float32|bfloat16]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn


def floor(plan: dict[str, Any], rounds: common.Rounds, dtype: torch.dtype) -> float | None:
    """One plain loop over all clients' tokens of each round, in the batch size that suits the
    machine best.

    No federation and no clients: batches of similar length, one adapter, one head. It then
    evaluates all test examples of all clients in batches of similar length.
    """
    model = common.build(plan, dtype)
    common.put(model, plan["adapter"])
    head = {name: value.clone().requires_grad_() for name, value in plan["head"].items()}
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.values())
    optimizer = torch.optim.AdamW(parameters, lr=plan["lr"], weight_decay=0.0)
    tests = sorted(
        (e for c in plan["clients"].values() for e in c["test"]), key=lambda e: len(e["input_ids"])
    )

    def work(examples: list[dict[str, Any]], size: int) -> float:
        started = time.perf_counter()
        model.train()
        for start in range(0, len(examples), size):
            batch = common.collate(examples[start : start + size], plan["pad"], plan["kind"])
            loss = common.loss_of(
                common.logits(model, head, batch, plan["kind"]), batch, plan["kind"]
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, plan["clip"])
            optimizer.step()
        return time.perf_counter() - started

    def examples_of(round: int) -> list[dict[str, Any]]:
        chosen = [
            c["train"][i]
            for c in plan["clients"].values()
            for batch in c["batches"][round]
            for i in batch
        ]
        return sorted(chosen, key=lambda e: len(e["input_ids"]))

    sizes = (8, 16, 32, 64)
    sample = examples_of(0)[
        :: max(1, len(examples_of(0)) // 64)
    ]  # about 64 of them, of all lengths
    work(sample[:8], 8)  # warm
    best = min(sizes, key=lambda size: work(sample, size))
    rounds.notes["batch_size"] = best
    for round in range(plan["rounds"]):
        seconds = work(examples_of(round), best)
        started = time.perf_counter()
        common.evaluate(model, {name: value.detach() for name, value in head.items()}, plan, tests)
        rounds.row(seconds, time.perf_counter() - started)
    return None  # one model for all: its accuracy says nothing about federated clients


def one_by_one(plan: dict[str, Any], rounds: common.Rounds, reload: bool) -> float:
    """FedAvg of PEFT in one process, a client after the other; ``reload``: the base is loaded anew
    for each.
    """
    model = common.build(plan)
    state = plan["adapter"]
    heads = dict.fromkeys(plan["clients"], plan["head"])
    accuracy = 0.0
    for round in range(plan["rounds"]):
        started = time.perf_counter()
        adapters, counts = [], []
        for name, client in plan["clients"].items():
            if reload:
                model = common.build(plan)
            common.put(model, state)
            heads[name], _ = common.train(model, heads[name], plan, client, round)
            adapters.append(common.get(model))
            counts.append(len(client["train"]))
        state = common.mean(adapters, counts)
        trained = time.perf_counter()
        scores = []
        for name, client in plan["clients"].items():
            if reload:
                model = common.build(plan)
            common.put(model, state)
            scores.append(common.evaluate(model, heads[name], plan, client["test"]))
        accuracy = sum(scores) / len(scores)
        rounds.row(trained - started, time.perf_counter() - trained)
    return accuracy


def main() -> None:
    who, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    dtype = getattr(torch, sys.argv[4]) if len(sys.argv) > 4 else torch.float32
    plan, rounds = common.load(folder), common.Rounds(out)
    torch.manual_seed(0)
    rounds.close(
        floor(plan, rounds, dtype) if who == "floor" else one_by_one(plan, rounds, who == "reload")
    )


if __name__ == "__main__":
    main()
