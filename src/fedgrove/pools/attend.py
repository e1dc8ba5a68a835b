"""The router of RAMoLE (arXiv 2406.16989) trained: its two factors at each site, by the task's loss,
while each member is left out half of the time (two stay, ours), so that it can meet members unseen.
Nothing else moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra
from fedgrove.federation.readers import Row
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.seeds import numpy_rng
from fedgrove.methods.contract import Step
from fedgrove.pools.pool import ROUTER, Pool
from fedgrove.training.loop import Clock
from fedgrove.use.questions import answered

LEFT_OUT = 0.5
STRETCHES = 4  # of a pass over the rows, each with members of its own


def attended(
    pool: Pool,
    rows: Sequence[Row],
    *,
    epochs: int = 3,
    lr: float = 1e-3,
    seed: int = 0,
) -> Pool:
    """The same pool, its router trained on rows with their answers. Raises ``FedgroveError``."""
    if pool.plan.router != "attention":
        raise AdapterError(
            f"--train is for --router attention; {pool.plan.router} has nothing that trains."
        )
    kernel = pool.kernel
    examples = kernel.task.encode(answered(kernel.task, rows), kernel.base.processor)
    values = router_of(pool.assembly)
    rate = lr / kernel.options.lr
    for number in range(epochs * STRETCHES):
        few = pool.without(*left_out(pool.names, seed, number))
        training = {name: Extra(value, home="server", lr=rate) for name, value in values.items()}
        step = Step(
            few.assembly.frozen().with_extras(training),
            epochs=1 / STRETCHES,
            stream=f"stretch {number}",
        )
        trained = kernel.train(step, examples, Clock(seed, ("router",)))
        values = {name: trained.extra(name) for name in values}
    return with_router(pool, values)


def left_out(
    names: Sequence[str],
    seed: int,
    stretch: int,
) -> list[str]:
    """The members that a stretch does without: each by a coin, but two stay."""
    rng = numpy_rng(seed, "left out", stretch)
    order = [names[int(i)] for i in rng.permutation(len(names))]
    gone = [name for name in order if float(rng.random()) < LEFT_OUT]
    return gone[: max(0, len(names) - 2)]


def router_of(assembly: Assembly) -> dict[str, Tensor]:
    """The factors that all members share, by their names: A [width, in], B [out, width]."""
    return {name: extra.value for name, extra in assembly.extras.items() if name.startswith(ROUTER)}


def with_router(pool: Pool, values: Mapping[str, Tensor]) -> Pool:
    """The same pool with these factors, [any shape] as ``router_of`` gives them."""
    extras = {
        name: replace(pool.assembly.extras[name], value=each) for name, each in values.items()
    }
    return Pool(
        pool.members,
        pool.plan,
        pool.kernel,
        pool.assembly.with_extras(extras),
    )
