"""A head without training: each class by the mean of a few examples' features.

Source: the use of LoRA Recycle (arXiv 2412.02220, CVPR 2025), after Snell et al., "Prototypical
Networks" (NeurIPS 2017): ``p = softmax(−‖f(x) − c_y‖²)``. Up to a constant, ``−‖f − c_y‖²`` is the
linear head ``H_y = 2 c_y``, ``b_y = −‖c_y‖²``, so that what leaves is a PEFT adapter and a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra
from fedgrove.ground.errors import DataError, RunError
from fedgrove.methods.head import PREFIX
from fedgrove.use.adapt import Arrived


def by_prototypes(arrived: Arrived) -> tuple[str, Assembly]:
    """The model that a newcomer is welcomed with, its head the class means of its training rows
    (``use.adapt.Way``). Raises ``FedgroveError`` where there is no such head.
    """
    parts, half = arrived.parts, arrived.half
    if parts.base.head != "pooled" or not parts.task.classifies:
        raise RunError(
            f"{arrived.result.path}: prototypes make a linear head on pooled states (model.head = "
            "pooled, of a classification); adapt it with --how train."
        )
    examples = arrived.examples["train"]
    features = half.kernel.features(examples, half.deployed(arrived.assembly))
    labels = [each["label"] for each in examples]
    head = prototype_head(features, labels, parts.task.labels)
    extras = {PREFIX + name: Extra(value, train=False) for name, value in head.items()}
    return "by prototypes", arrived.assembly.with_extras(extras)


def prototype_head(
    features: Float[Tensor, "n h"],
    labels: Sequence[int],
    classes: Sequence[str],
) -> dict[str, Tensor]:
    """``weight`` [c, h] and ``bias`` [c] whose logits are ``−‖f − c_y‖²`` up to what all classes
    share. Raises ``DataError`` for a class without an example.
    """
    numbers = torch.tensor(labels)
    missing = [name for number, name in enumerate(classes) if number not in labels]
    if missing:
        listed = ", ".join(map(repr, missing))
        raise DataError(
            f"the training rows have no example of {listed}, and prototypes take one or more of each "
            "class; add some, or adapt with --how train"
        )
    rows: list[Tensor] = []
    for number in range(len(classes)):
        own = features[numbers == number]
        rows.append(own.mean(0))
    means = torch.stack(rows)
    lengths = means.square().sum(1)
    return {"weight": 2 * means, "bias": -lengths}
