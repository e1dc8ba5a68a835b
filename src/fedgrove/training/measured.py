"""How good a finished model is, by every metric that its task and its job name.

The rounds measure sums of each batch (``Task.score``), which cost nothing beside the pass; these are
computed once, out of all answers side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fedgrove.federation.metrics import asked, measures
from fedgrove.ground.plain import Plain

if TYPE_CHECKING:
    from fedgrove.adapters.assembly import Assembly
    from fedgrove.federation.tasks.base import Example
    from fedgrove.training.kernel import Kernel


def measured(
    kernel: Kernel,
    assembly: Assembly,
    examples: Sequence[Example],
    more: Iterable[str] = (),
) -> Plain:
    """The task's metrics, and ``more`` by their names; {} where there are none. A value is a
    number, a number for each class, or None where it is not defined.
    """
    task = kernel.task
    names = asked(task, more)
    if not names:
        return {}
    if not kernel.writes:
        return measures(names, task.compared(kernel.logits(assembly, examples), examples))
    chosen = [examples[index] for index in kernel.chosen(examples)]
    return measures(names, task.compared(kernel.generate(assembly, chosen), chosen))
