"""Our pooled head as the one of a class of transformers, where the two are one function.

That is so where the class has one linear layer on what our head sees, which is tried out: BERT's
kin for tokens, and the image models that average their last states. Classifiers of texts have
something between (BERT a tanh layer on the first token, ModernBERT a layer and a norm, decoders
their last token alone).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedgrove.federation.tasks.base import HeadedTask
from fedgrove.interop.models import own_modules

#: how far logits may be apart that are computed in another order
_ROUNDING = 1e-5


@torch.no_grad()
def as_stock(
    encoder: PreTrainedModel,
    head: Mapping[str, Tensor],
    kind: Any,
    task: HeadedTask,
) -> PreTrainedModel | None:
    """The model of the class ``kind`` (an Auto class) that computes the task's logits on the encoder
    under our head, weight [c, h] and bias [c]; None where it does not.
    """
    config = copy.deepcopy(encoder.config)
    config.num_labels = len(head["bias"])
    try:
        with torch.random.fork_rng(devices=[]):
            model: PreTrainedModel = kind.from_config(config)
    except ValueError:  # the class does not know the architecture
        return None
    modules = own_modules(model)
    if len(modules) != 1:
        return None
    own = model.get_submodule(modules[0])
    if not isinstance(own, nn.Linear) or own.bias is None:
        return None
    if own.weight.shape != head["weight"].shape:
        return None
    own.load_state_dict(dict(head))
    missing, _ = model.base_model.load_state_dict(encoder.state_dict(), strict=False)
    if missing:
        return None
    model.float().eval()
    inputs = _inputs(config)
    states = encoder(**inputs).last_hidden_state
    if task.level == "example":
        states = task.pool(states, inputs)
    ours = task.head_logits(states, head)
    theirs = model(**inputs).get("logits")
    if theirs is None or ours.shape != theirs.shape:
        return None
    scale = float(ours.abs().max()) + 1.0
    if not torch.allclose(ours, theirs, rtol=0, atol=_ROUNDING * scale):
        return None
    return model


def _inputs(config: Any) -> dict[str, Tensor]:
    """Two random examples for any model of the configuration: texts [2, 7], of which the second has
    padding, or images [2, channels, size, size].
    """
    rng = torch.Generator().manual_seed(0)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, size, size, generator=rng)}
    ids = torch.randint(config.vocab_size, (2, 7), generator=rng)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    ids[1, 4:] = getattr(config, "pad_token_id", None) or 0
    return {"input_ids": ids, "attention_mask": mask}
