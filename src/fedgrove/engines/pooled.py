"""All rows on one machine: the ceiling that a comparison of federated methods is seen against.

No federation: one adapter and one head train on everybody's training rows, with as many steps in a
round as the clients that would take part have together, and are measured on each client's own
rows. Nothing travels, so this is a row of a comparison and no method that organisations could run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fedgrove.engines.local import LocalEngine, prepare
from fedgrove.federation.tasks.base import Example
from fedgrove.ground.errors import JobError
from fedgrove.ground.files import write_json
from fedgrove.methods.contract import ClientInfo
from fedgrove.runs.engine import Arrival, OfferOf
from fedgrove.runs.stage import Stage
from fedgrove.training.client import ClientHalf

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.runs.directory import RunDirectory
    from fedgrove.tracking.callback import Callback

NAME = "pooled"  # among the methods of a comparison
EVERYONE = "everyone"  # who trains, in the metrics
MARK = "pooled.json"  # in the run's directory, whose job says FedIT


def pooled(job: Job) -> Job:
    """The job of the one who has everybody's rows: FedIT, whose mean over one is that one, with one
    head for all; nobody attacks, so nothing defends. Raises ``JobError`` where the job protects
    clients, of which there are none.
    """
    if job.privacy.client_level or job.privacy.example_level:
        raise JobError(
            f"{NAME} puts all rows on one machine, where [privacy] protects nobody; leave {NAME} out "
            "of --methods, or leave out [privacy]."
        )
    job = job.override(
        ["method.name=fedit", "defence.rule=none", "defence.norm=", "attack.kind=none"]
    )
    federation: dict[str, object] = {"ranks": []}
    if job.federation.head == "local" and not job.data.task_class.writes:
        federation["head"] = "shared"
    return job.replace(
        federation=federation, lora={"scaling": "global"}, run={"noise": False, "compress": "none"}
    )


def steps_of(job: Job, clients: int, rows: int) -> int:
    """Optimiser steps in a round: those of all who would take part, or their share of as many
    passes over all rows.
    """
    drawn = max(1, round(job.federation.fraction * clients))
    train = job.train
    if train.local_epochs is None:
        return drawn * (train.local_steps or 1)
    epoch = math.ceil(rows / (train.batch_size * train.accumulation))
    return max(1, round(train.local_epochs * epoch * drawn / clients))


class PooledEngine(LocalEngine):
    """As a simulation, but one trains who has the rows of all."""

    def __init__(self, stage: Stage[LocalEngine]):
        engine = stage.engine
        super().__init__(stage.parts, engine.half, engine.clients, engine.data, engine.held_out)
        self.rows: list[Example] = []
        for name in stage.clients:
            self.rows += engine.data[name]["train"]
        rank = stage.method.setting.rank
        self.everyone = ClientInfo(EVERYONE, rank, len(self.rows))
        steps = steps_of(stage.job, len(stage.clients), len(self.rows))
        longer = stage.job.replace(train={"local_steps": steps})
        self.whole: ClientHalf = replace(stage.parts, job=longer).client_half()

    def train(self, round: int, clients: Sequence[str], offer: OfferOf) -> Iterator[Arrival]:
        outcome = self.whole.train(self.everyone, self.rows, offer(clients[0]), {}, round)
        yield Arrival(
            update=outcome.update,
            round=round,
            loss=outcome.loss,
            steps=outcome.steps,
            trained=outcome.trained,
            up=0,
            down=0,
            bytes_up=0,
            bytes_down=0,
            seconds=outcome.seconds,
        )


@contextmanager
def all_rows(
    job: Job, directory: RunDirectory, *, resume: bool, watch: Callback
) -> Iterator[Stage[LocalEngine]]:
    """The stage of such a run; ``job`` as ``pooled`` gives it."""
    stage = prepare(job)
    write_json(directory.path / MARK, {"trained": EVERYONE})
    yield replace(stage, engine=PooledEngine(stage), called=NAME)
