"""What the opponents share: a PEFT model, a batch, a client's local training and evaluation, as
people write them.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Head = dict[str, Tensor]
Weights = dict[str, Tensor]


def load(folder: Path) -> dict[str, Any]:
    """The plan, with its first adapter (by PEFT's own key names) and head under "adapter" and
    "head".
    """
    from safetensors.torch import load_file

    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    start = load_file(folder / "start.safetensors")
    plan["head"] = {
        name.removeprefix("head."): value
        for name, value in start.items()
        if name.startswith("head.")
    }
    plan["adapter"] = {
        f"base_model.model.{name[:-2]}.lora_{name[-1]}.weight": value
        for name, value in start.items()
        if not name.startswith("head.")
    }
    return plan


def build(plan: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A PEFT model on the plan's base, without dropout, in training mode."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(plan["model"])
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    kind = AutoModelForCausalLM if plan["kind"] == "lm" else AutoModel
    options = (
        {"attn_implementation": "eager"} if dtype == torch.bfloat16 else {}
    )  # the faster one there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(plan["model"], config=config, dtype=dtype, **options)
    lora = LoraConfig(
        r=plan["rank"], lora_alpha=plan["alpha"], target_modules=plan["targets"], lora_dropout=0.0
    )
    return get_peft_model(model, lora)


def put(model: Any, weights: Weights) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, weights)


def get(model: Any) -> Weights:
    from peft import get_peft_model_state_dict

    return {
        name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()
    }


def collate(examples: list[dict[str, Any]], pad: int, kind: str) -> dict[str, Tensor]:
    """Padded on the right to the longest of the batch."""
    longest = max(len(e["input_ids"]) for e in examples)

    def padded(key: str, filler: int) -> Tensor:
        return torch.tensor([e[key] + [filler] * (longest - len(e[key])) for e in examples])

    ids = padded("input_ids", pad)
    mask = torch.tensor(
        [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    )
    labels = (
        padded("labels", -100) if kind == "lm" else torch.tensor([e["label"] for e in examples])
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: Any, head: Head, batch: dict[str, Tensor], kind: str) -> Tensor:
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    if kind == "lm":
        return out.logits
    mask = batch["attention_mask"][..., None].float()
    pooled = (out.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
    return F.linear(pooled, head["weight"], head["bias"])


def loss_of(out: Tensor, batch: dict[str, Tensor], kind: str) -> Tensor:
    if kind == "lm":
        return F.cross_entropy(
            out[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
    return F.cross_entropy(out, batch["labels"])


def train(
    model: Any, head: Head, plan: dict[str, Any], client: dict[str, Any], round: int
) -> tuple[Head, float]:
    """A client's local steps of a round (from 0), on the plan's batches: AdamW, clipped; (its head,
    mean loss).
    """
    head = {name: value.clone().requires_grad_() for name, value in head.items()}
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.values())
    optimizer = torch.optim.AdamW(parameters, lr=plan["lr"], weight_decay=0.0)
    total = 0.0
    model.train()
    for indices in client["batches"][round]:
        batch = collate([client["train"][i] for i in indices], plan["pad"], plan["kind"])
        loss = loss_of(logits(model, head, batch, plan["kind"]), batch, plan["kind"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, plan["clip"])
        optimizer.step()
        total += loss.item()
    return {name: value.detach() for name, value in head.items()}, total / len(
        client["batches"][round]
    )


@torch.no_grad()
def evaluate(model: Any, head: Head, plan: dict[str, Any], examples: list[dict[str, Any]]) -> float:
    """Accuracy on a client's test split; for language models the negative mean loss per token."""
    model.eval()
    right = count = 0.0
    for start in range(0, len(examples), plan["eval_batch"]):
        batch = collate(examples[start : start + plan["eval_batch"]], plan["pad"], plan["kind"])
        out = logits(model, head, batch, plan["kind"])
        if plan["kind"] == "lm":
            targets = int((batch["labels"][:, 1:] != -100).sum())
            right -= float(loss_of(out, batch, "lm")) * targets
            count += targets
        else:
            right += float((out.argmax(-1) == batch["labels"]).sum())
            count += len(batch["labels"])
    return right / count


def mean(adapters: list[Weights], examples: list[int]) -> Weights:
    """FedAvg: the mean weighted by examples."""
    total = sum(examples)
    return {
        name: sum((a[name] * (n / total) for a, n in zip(adapters[1:], examples[1:], strict=True)),
                  adapters[0][name] * (examples[0] / total))
        for name in adapters[0]
    }  # fmt: skip


class Rounds:
    """Seconds of each round's training and evaluation, and the final accuracy, written as JSON at
    the end.
    """

    def __init__(self, out: Path):
        self.out, self.began, self.rows, self.notes = out, time.perf_counter(), [], {}

    def row(self, train: float, evaluation: float) -> None:
        self.rows.append({"train": train, "evaluate": evaluation})

    def close(self, accuracy: float | None) -> None:
        seconds = time.perf_counter() - self.began
        content = {"rounds": self.rows, "accuracy": accuracy, "inside": seconds, **self.notes}
        self.out.write_text(json.dumps(content))
