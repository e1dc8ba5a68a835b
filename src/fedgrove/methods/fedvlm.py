"""FedVLM: the mirror of FedSA-LoRA. Both factors train, B is averaged, A stays with the client.

Source: FedVLM, arXiv 2507.17088.
"""

from __future__ import annotations

from fedgrove.methods._halves import Half, SharedB


class FedVLM(Half):
    name = "fedvlm"
    title = "FedVLM"
    paper = "arXiv 2507.17088"
    trains = "A, B"
    shares = "B"
    keeps = "A"
    Rule = SharedB
    private = "A"
