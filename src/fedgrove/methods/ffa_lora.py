"""FFA-LoRA: A stays frozen at the shared draw, only B trains and travels. Averaging B is then
exact.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313.
"""

from __future__ import annotations

from fedgrove.methods._halves import FrozenA, Half


class FFALoRA(Half):
    name = "ffa-lora"
    title = "FFA-LoRA"
    paper = "arXiv 2403.12313"
    trains = "B"
    shares = "B"
    keeps = "nothing (A is frozen at the shared draw)"
    Rule = FrozenA
