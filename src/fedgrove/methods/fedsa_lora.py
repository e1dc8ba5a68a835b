"""FedSA-LoRA: both factors train, A is averaged, B (and the head) stay with the client.

Source: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv
2410.01463.
"""

from __future__ import annotations

from fedgrove.methods._halves import Half, SharedA


class FedSALoRA(Half):
    name = "fedsa-lora"
    title = "FedSA-LoRA"
    paper = "arXiv 2410.01463"
    trains = "A, B"
    shares = "A"
    keeps = "B"
    Rule = SharedA
    private = "B"
