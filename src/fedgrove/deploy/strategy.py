"""``Rounds``: Fedgrove's round loop as a strategy of Flower.

A strategy of Flower sends one content to all and wants like contents back. Here each client gets an
offer of its own, and what is aggregated is the method's business; so ``start`` hands the grid to
the round loop, and the four hooks between which Flower's own loop would run have nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result as FlowerResult
from flwr.serverapp.strategy import Strategy

from fedgrove.engines.flower.serve import between_sites, on_virtual_nodes
from fedgrove.ground.plain import Plain
from fedgrove.start import Opener, run
from fedgrove.tracking.live import progress

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.tracking.callback import Callback
    from fedgrove.use.result import Result


class Rounds(Strategy):
    """Runs a job over a grid into ``out``. ``names``: as in ``on_grid``; progress goes to standard
    output where there are no ``callbacks``.
    """

    def __init__(
        self,
        job: Job,
        out: Path,
        *,
        resume: bool = False,
        names: Mapping[int, str] | None = None,
        callbacks: Sequence[Callback] | None = None,
    ):
        self.job, self.out, self.resume = job, out, resume
        self.names, self.callbacks = names, callbacks

    def start(self, grid: Grid, *ignored: object, **also_ignored: object) -> FlowerResult:
        """The whole run. The job has what Flower's arguments would say; the result has each round's
        mean measures.
        """
        self.summary()
        callbacks = self.callbacks
        if callbacks is None:
            callbacks = [progress()]
        found = on_grid(
            grid, self.job, self.out, resume=self.resume, callbacks=callbacks, names=self.names
        )
        result = FlowerResult()
        for split, rounds in (
            ("train", result.train_metrics_clientapp),
            ("test", result.evaluate_metrics_clientapp),
        ):
            for number, means in _means(found.metrics(), split).items():
                rounds[number] = MetricRecord({**means})
        return result

    def summary(self) -> None:
        """One line on what will run."""
        print(f"{self.job.method.name}, {self.job.run.rounds} rounds into {self.out}", flush=True)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return ()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return ()

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None


def on_grid(
    grid: Grid,
    job: Job,
    out: Path,
    *,
    resume: bool,
    callbacks: Sequence[Callback] = (),
    names: Mapping[int, str] | None = None,
) -> Result:
    """Run a job over a grid: between real sites, or on the virtual nodes of a simulation.

    ``names``: the site to which each node's key belongs; a node that says another name is refused.
    """
    engine: Opener = partial(between_sites, grid, names)
    if type(grid).__name__ == "InMemoryGrid":
        # of Flower's simulation; a deployment's goes over the network
        engine = partial(on_virtual_nodes, lambda nodes, job: nullcontext(grid))
    return run(job, out, resume=resume, callbacks=callbacks, engine=engine)


def _means(lines: Sequence[Plain], split: str) -> dict[int, dict[str, float]]:
    """``{round: {measure: mean over clients}}`` of one split."""
    rounds: dict[int, dict[str, list[float]]] = {}
    for line in lines:
        if line["split"] == split:
            for key, value in line.items():
                if isinstance(value, float):
                    rounds.setdefault(line["round"], {}).setdefault(key, []).append(value)
    return {
        number: {key: sum(values) / len(values) for key, values in measures.items()}
        for number, measures in rounds.items()
    }
