"""What each party leaves with: ``RUN/parties/NAME/``.

A party of texts has a PEFT LoRA directory with its output weights as head; one of columns a
safetensors file. Each card says that it needs the others: the class is the largest of the sum of all
parties' shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from fedgrove.adapters.private import unseal
from fedgrove.ground import files
from fedgrove.ground.plain import Plain
from fedgrove.vertical.job import VerticalJob
from fedgrove.vertical.party import Columns, Party
from fedgrove.vertical.server import Server
from fedgrove.vertical.tables import Entities

NEEDS = (
    "One share of a sum: it predicts nothing alone. Add the shares of all parties for the same entity; "
    "the largest is the class."
)
CARD = "party.json"
WEIGHTS = "party.safetensors"


def leave(
    job: VerticalJob,
    joined: Entities,
    parties: Sequence[Party],
    server: Server,
    folder: Path,
) -> None:
    """Write each party's directory."""
    names = [party.name for party in parties]
    for party in parties:
        card: Plain = {
            "party": party.name,
            "needs_the_others": NEEDS,
            "parties": names,
            "classes": list(joined.classes),
            "method": job.settings.method.name,
        }
        weight = _weight(party, server)
        target = folder / party.name
        if isinstance(party, Columns):
            section = job.parties[party.name]
            card["columns"] = list(section.columns or ())
            _columns(party, weight, card, target)
        else:
            _texts(party, weight, card, target)


def _weight(party: Party, server: Server) -> Float[Tensor, "h c"]:
    """Its output weights, whoever trained them."""
    if party.weight is not None:
        return unseal(party.weight).float()
    return server.weights[party.name].float()


def _columns(
    party: Columns,
    weight: Float[Tensor, "h c"],
    card: Plain,
    target: Path,
) -> None:
    """``share = ReLU([(x − mean) / spread, 1] V) W``; without V where there is no embedding."""
    tensors = {
        "mean": party.mean,
        "spread": party.spread,
        "W": weight.contiguous(),
    }
    if party.inner is not None:
        tensors["V"] = unseal(party.inner).contiguous()
    card["share"] = leave_formula(party.inner is not None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_directory(target) as partial:
        files.write_bytes(partial / WEIGHTS, save(tensors))
        files.write_json(partial / CARD, card)


def leave_formula(embedded: bool) -> str:
    """How a share is computed, in words for the card."""
    scaled = "[(x - mean) / spread, 1]"
    if embedded:
        return f"relu({scaled} @ V) @ W"
    return f"{scaled} @ W"


def _texts(
    party: Party,
    weight: Float[Tensor, "h c"],
    card: Plain,
    target: Path,
) -> None:
    from fedgrove.interop.peft import save_adapter
    from fedgrove.vertical.texts import Texts

    assert isinstance(party, Texts)
    head = {"weight": weight.T.contiguous(), "bias": torch.zeros(weight.shape[1])}
    adapter = {site: factors.map(unseal) for site, factors in party.adapter.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(
        target,
        adapter,
        base=party.base.upstream,
        head=head,
        head_kind="pooled",
        card=card,
    )
