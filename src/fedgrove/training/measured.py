"""How good a finished model is, by every metric that its task and its job name.

The rounds measure sums of each batch (``Task.score``), which cost nothing beside the pass; these are
computed once, out of all answers of such a pass side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fedgrove.federation.metrics import asked, measures
from fedgrove.ground.plain import Plain
from fedgrove.training.kernel import in_order
from fedgrove.training.readers import logits_in

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Example, Task
    from fedgrove.training.readers import Found


def measured(
    task: Task,
    found: Found,
    examples: Sequence[Example],
    more: Iterable[str] = (),
) -> Plain:
    """The task's metrics, and ``more`` by their names, of what an evaluation on ``examples`` found; {}
    where there are none. A value is a number, a number for each class, or None where it is not
    defined.
    """
    names = asked(task, more)
    if not names or not found:
        return {}
    chosen = [examples[number] for number in sorted(found)]
    return measures(names, task.compared(written(found) or logits(found), chosen))


def written(found: Found) -> list[str]:
    """The texts among the answers, in the order of their examples."""
    texts = {number: answer for number, answer in found.items() if isinstance(answer, str)}
    return [texts[number] for number in sorted(texts)]


def logits(found: Found) -> Float[Tensor, "n *t c"]:
    """The logits among the answers, in the order of their examples."""
    return in_order(dict(enumerate(logits_in(found))))
