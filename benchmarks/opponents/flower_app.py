"""Opponent (b): a Flower simulation (Ray) of PEFT and FedAvg; the model is cached in each actor.

    python flower_app.py PLAN_FOLDER OUT.json CPUS_PER_CLIENT

The client's head stays in ``Context.state``; the adapter travels as an ``ArrayRecord``; the
strategy is Flower's own FedAvg. ``run_simulation`` is called in this process, which spares Flower
the ten seconds of ``flwr run``.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

FOLDER = Path(os.environ.get("FG_PLAN", "."))
client_app = ClientApp()
server_app = ServerApp()


@functools.cache
def resident() -> tuple[dict[str, Any], Any]:
    """Once for each Ray actor: the data and the model."""
    torch.set_num_threads(int(os.environ["FG_CPUS"]))
    plan = common.load(FOLDER)
    return plan, common.build(plan)


def _client(context: Context, plan: dict[str, Any]) -> dict[str, Any]:
    return list(plan["clients"].values())[int(context.node_config["partition-id"])]


def _head(context: Context, plan: dict[str, Any]) -> common.Head:
    return context.state["head"].to_torch_state_dict() if "head" in context.state else plan["head"]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    plan, model = resident()
    client = _client(context, plan)
    common.put(model, message.content["arrays"].to_torch_state_dict())
    round = int(message.content["config"]["server-round"]) - 1
    head, loss = common.train(model, _head(context, plan), plan, client, round)
    context.state["head"] = ArrayRecord(head)
    metrics = MetricRecord({"loss": loss, "num-examples": len(client["train"])})
    return Message(
        RecordDict({"arrays": ArrayRecord(common.get(model)), "metrics": metrics}), reply_to=message
    )


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    plan, model = resident()
    client = _client(context, plan)
    common.put(model, message.content["arrays"].to_torch_state_dict())
    accuracy = common.evaluate(model, _head(context, plan), plan, client["test"])
    return Message(
        RecordDict({"metrics": MetricRecord({"accuracy": accuracy, "num-examples": 1})}),
        reply_to=message,
    )


class Timed(FedAvg):
    """FedAvg that notes when training and evaluation of each round are done."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.marks = [time.perf_counter()]

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        done = super().aggregate_train(server_round, replies)
        self.marks.append(time.perf_counter())
        return done

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        done = super().aggregate_evaluate(server_round, replies)
        self.marks.append(time.perf_counter())
        return done


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    plan, rounds = common.load(FOLDER), common.Rounds(Path(os.environ["FG_OUT"]))
    clients = len(plan["clients"])
    strategy = Timed(
        min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients
    )
    result = strategy.start(
        grid,
        ArrayRecord(plan["adapter"]),
        num_rounds=plan["rounds"],
        train_config=ConfigRecord({"x": 1}),
    )
    marks = strategy.marks
    for start in range(0, len(marks) - 2, 2):
        rounds.row(marks[start + 1] - marks[start], marks[start + 2] - marks[start + 1])
    rounds.close(float(result.evaluate_metrics_clientapp[plan["rounds"]]["accuracy"]))


def simulate(folder: Path, out: Path, cpus: int) -> None:
    import flower_app  # by its own name, so that Ray's workers import it instead of unpickling it
    from flwr.simulation import run_simulation

    plan = common.load(folder)
    run_simulation(
        flower_app.server_app,
        flower_app.client_app,
        num_supernodes=len(plan["clients"]),
        backend_config={"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    os.environ |= {"FG_PLAN": sys.argv[1], "FG_OUT": sys.argv[2], "FG_CPUS": sys.argv[3]}
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    simulate(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
