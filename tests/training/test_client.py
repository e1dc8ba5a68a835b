"""A client's half: a model is measured once, however often it is asked about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_job

from fedgrove.adapters.assembly import Assembly
from fedgrove.engines.local import prepare
from fedgrove.training.kernel import Kernel
from fedgrove.training.measured import logits
from fedgrove.training.readers import Found


def test_a_model_is_measured_again_only_when_it_or_the_data_changed(
    tiny_bert: Path, silos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(tiny_job(tiny_bert, silos))
    half, (name, info) = prepared.engine.half, next(iter(prepared.clients.items()))
    data = prepared.engine.data[name]
    calls: list[int] = []
    evaluate = Kernel.evaluate

    def counted(kernel: Kernel, assembly: Assembly, examples: Any, *rest: Any) -> dict[str, float]:
        calls.append(len(examples))
        return evaluate(kernel, assembly, examples, *rest)

    monkeypatch.setattr(Kernel, "evaluate", counted)
    offer = {"method": prepared.method.offer(prepared.method.begin([info]), 1, info)}
    model = half.personal(info, offer, {})
    first = half.measure(name, model, data["test"])
    first["loss"] = 99.0  # what is handed out is the asker's own
    assert half.measure(name, half.personal(info, offer, {}), data["test"])["loss"] < 99
    assert len(calls) == 1
    found: Found = {}
    half.measure(name, model, data["test"], found)
    assert len(calls) == 1, "what it answered is known too"
    exported = half.deployed(model)
    assert torch.equal(logits(found), half.kernel.logits(exported, data["test"]))
    half.measure(name, model, data["train"])
    assert len(calls) == 2, "other data"
    half.measure(name, model, data["test"])
    assert len(calls) == 3
    half.measure("another", model, data["test"])
    assert len(calls) == 4, "another client"
    bias = model.extras["head.bias"]
    head = replace(model, extras={**model.extras, "head.bias": replace(bias, value=bias.value + 1)})
    half.measure(name, head, data["test"])
    assert len(calls) == 5, "another head"
    term = model.terms[0]
    site, factors = next(iter(term.adapter.items()))
    moved = replace(term, adapter={**term.adapter, site: replace(factors, B=factors.B + 0.1)})
    half.measure(name, replace(head, terms=(moved,)), data["test"])
    assert len(calls) == 6, "another adapter"
