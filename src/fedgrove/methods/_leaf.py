"""grove's leaf: private modules on a frozen path, and how much of branch and leaf a client keeps.

A leaf overfits what a client has little of, and a group can be the wrong one. So part of the
client's own training rows is held out of the leaf's training, and on these it chooses a *gate* for
branch and leaf: first one pair for all layers, then one for each stretch of them (shallow, middle,
deep) with the others as they are. What it deploys lies half-way between the two: few rows say
little of a single stretch. Leaving out both is among the choices, so that a client falls behind the
root by no more than the noise of its held-out loss.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedgrove.adapters.assembly import Assembly, Junction, Mix
from fedgrove.methods.contract import Step, Trained

ROOT, BRANCH, LEAF = "root", "branch", "leaf"
#: the rows that the gate is chosen on, and that the leaf never sees
HELD = (0.75, 1.0)
SEEN = (0.0, 0.75)
STRETCHES = 3

Gate = tuple[float, float]  # of branch and leaf
WHOLE: Gate = (1.0, 1.0)
#: What may be chosen, the more shared first: it stays where the loss is equal.
CHOICES: tuple[Gate, ...] = ((1.0, 0.0), (0.0, 0.0), (1.0, 0.5), WHOLE, (0.0, 1.0))


@dataclass(frozen=True)
class Gated(Mix):
    """Branch and leaf by a gate for each layer; the whole of both where it has none."""

    gates: Mapping[int, Gate] = field(default_factory=dict)

    def weigh(self, at: Junction) -> Sequence[float]:
        """As in Mix."""
        branch, leaf = self.gates.get(at.site.layer, WHOLE)
        known = {BRANCH: branch, LEAF: leaf}
        return [known.get(term, 1.0) for term in at.terms]


def stretches(layers: Sequence[int]) -> list[list[int]]:
    """The layers in at most three parts, shallow to deep, as even as they go."""
    count = min(STRETCHES, len(layers))
    bounds = [round(part * len(layers) / count) for part in range(count + 1)]
    return [list(layers[bounds[part] : bounds[part + 1]]) for part in range(count)]


def gate_steps(
    trained: Assembly, layers: Sequence[int]
) -> Generator[Step, Trained, dict[int, Gate]]:
    """The gates that lose least on the held-out rows: a step for each trial, the gates at the end."""
    losses: dict[tuple[tuple[int, Gate], ...], float] = {}

    def loss(gates: Mapping[int, Gate]) -> Generator[Step, Trained, float]:
        key = tuple(sorted(gates.items()))
        if key not in losses:
            frozen = replace(trained.frozen(), mix=Gated(gates))
            looked = yield Step(frozen, head=False, measure="loss", part=HELD)
            losses[key] = looked.loss
        return losses[key]

    def best(base: Mapping[int, Gate], own: Sequence[int]) -> Generator[Step, Trained, Gate]:
        found: dict[Gate, float] = {}
        for gate in CHOICES:
            found[gate] = yield from loss({**base, **dict.fromkeys(own, gate)})
        return min(CHOICES, key=lambda gate: found[gate])

    common = yield from best({}, layers)
    gates = dict.fromkeys(layers, common)
    shrunk: dict[int, Gate] = {}
    for own in stretches(layers):
        branch, leaf = yield from best(gates, own)
        between = ((common[0] + branch) / 2, (common[1] + leaf) / 2)
        shrunk |= dict.fromkeys(own, between)
    return shrunk


def gates_of(trained: Sequence[Trained], layers: Sequence[int]) -> dict[int, Gate]:
    """The gates from what the steps of a round gave: the leaf's training, then ``gate_steps``'s."""
    steps = gate_steps(trained[0].assembly, layers)
    looked = iter(trained[1:])
    try:
        next(steps)
        while True:
            steps.send(next(looked))
    except StopIteration as stop:
        gates: dict[int, Gate] = stop.value
    return gates
