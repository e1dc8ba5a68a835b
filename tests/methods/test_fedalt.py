"""FedALT (2503.11880): the mean of the others, the gate, the identity with Local, and what
stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    SITES,
    adapter,
    aggregated,
    exports,
    files,
    info,
    lines,
    method,
    near,
    offered,
    refuses_to_send,
    resumes,
    satisfies,
    sent,
    update,
    watched,
    weights,
    welcomed,
)
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.assembly import Junction
from fedgrove.methods.contract import reveal
from fedgrove.methods.fedalt import FedALT, Gated, OwnAndGates, Rest
from fedgrove.start import run
from fedgrove.training.live import LiveAssembly

JOB: dict[str, Any] = {"method": {"name": "fedalt"}, "run": {"rounds": 2}}


def others(adapters: dict[str, Any], weight: dict[str, float], client: str) -> Any:
    """The dense mean of everybody but the client."""
    names = [n for n in adapters if n != client]
    total = sum(weight[n] for n in names)
    return {
        s: Factors(
            sum(weight[n] / total * adapters[n][s].A for n in names),
            sum(weight[n] / total * adapters[n][s].B for n in names),
            2.0,
        )
        for s in SITES
    }


@pytest.mark.parametrize("kind", ["uniform", "examples"])
def test_the_rest_of_the_world_is_the_mean_of_the_others(kind: str) -> None:
    ours = method("fedalt", weights=kind)
    adapters = {f"c{n}": adapter(n, size=100.0**n) for n in range(4)}
    examples = {name: 5.0 * (n + 1) for n, name in enumerate(adapters)}
    weight = examples if kind == "examples" else dict.fromkeys(adapters, 1.0)
    state = ours.begin([info(n) for n in adapters])
    assert offered(ours, state, 1, info("c0")).rest == {}
    state = aggregated(
        ours, state, 1, [update(n, int(examples[n]), adapter=adapters[n]) for n in ("c1", "c3")]
    )
    near(offered(ours, state, 2, info("c1")).rest, adapters["c3"])
    state = aggregated(
        ours, state, 2, [update(n, int(examples[n]), adapter=adapters[n]) for n in ("c0", "c2")]
    )
    for name in adapters:
        near(offered(ours, state, 3, info(name)).rest, others(adapters, weight, name))
    near(welcomed(ours, state, info("c0")).rest, others(adapters, weight, "nobody"))
    # an absent client keeps counting with what it sent last
    newer = {**adapters, "c1": adapter(9)}
    state = aggregated(ours, state, 3, [update("c1", int(examples["c1"]), adapter=newer["c1"])])
    near(offered(ours, state, 4, info("c3")).rest, others(newer, weight, "c3"))


def test_the_gate_weighs_each_token_by_a_softmax_over_its_input() -> None:
    site = SITES["layer.1.query"]
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, site.in_features, generator=rng, dtype=torch.float64)
    gate = torch.randn(2, site.in_features, generator=rng, dtype=torch.float64)
    own, rest = Gated().weigh(Junction(site, x, ["own", "rest"], {f"gate.{site.name}": gate}))
    for b in range(2):
        for t in range(5):
            logits = gate @ x[b, t]
            want = torch.exp(logits) / torch.exp(logits).sum()
            torch.testing.assert_close(own[b, t, 0], want[0])  # type: ignore[index]
            torch.testing.assert_close(rest[b, t, 0], want[1])  # type: ignore[index]


def test_the_live_assembly_adds_the_gated_terms() -> None:
    """What the kernel sums at a site is W0 x + α s B A x + (1 − α) s B' A' x."""
    ours = method("fedalt")
    rng = torch.Generator().manual_seed(2)
    gates = {
        f"gate.{n}": torch.randn(2, s.in_features, generator=rng).double() for n, s in SITES.items()
    }
    own = adapter(1)
    rest = adapter(2)
    assembly = ours.personal(info("a"), Rest(rest), OwnAndGates(own, gates))
    live = LiveAssembly(assembly, device=torch.device("cpu"), dtype=torch.float64, train=False)
    for name, site in SITES.items():
        x = torch.randn(3, 4, site.in_features, dtype=torch.float64)
        base = torch.randn(3, 4, site.out_features, dtype=torch.float64)
        share = torch.softmax(x @ gates[f"gate.{name}"].T, -1)
        want = (
            base
            + share[..., :1] * (x @ own[name].product().T)
            + share[..., 1:] * (x @ rest[name].product().T)
        )
        torch.testing.assert_close(live.add(site, x, base), want)


@pytest.mark.parametrize("clients", ["everybody", "some"])
def test_a_gate_fixed_to_its_own_is_local(
    clients: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job: dict[str, Any] = {
        "run": {"rounds": 2},
        "federation": {"fraction": 1.0 if clients == "everybody" else 0.7},
    }
    run(
        tiny_job(tiny_bert, silos, method={"name": "fedalt", "gate": "own"}, **job),
        tmp_path / "ours",
    )
    run(tiny_job(tiny_bert, silos, method={"name": "local"}, **job), tmp_path / "local")
    assert len(weights(tmp_path / "ours")) == 9
    assert weights(tmp_path / "ours") == weights(tmp_path / "local")
    assert lines(tmp_path / "ours") == lines(tmp_path / "local")


def test_a_resumed_run_is_bit_identical(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1), (2, 1)], **JOB)
    assert any(name.endswith("assembly.safetensors") for name in files(tmp_path / "whole"))


def test_what_travels_and_what_stays(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = watched(monkeypatch)
    found = run(tiny_job(tiny_bert, silos, **JOB), tmp_path / "out")
    whole = 4 * 4 * PER_RANK
    assert sent(tmp_path / "out", "site-0") == [(whole, 0), (whole, whole)]
    gates, head = 4 * 2 * 32, 2 * 32 + 2
    assert found.summary["parameters"]["trained"] == 4 * PER_RANK + gates + head
    assert found.summary["parameters"]["stored"] == 2 * 4 * PER_RANK + gates + head
    assert wire.private
    assert not wire.leaks()
    refuses_to_send(wire.kept[0].gates)
    assert all(gate.any() for gate in reveal(wire.kept[-1]).gates.values())


def test_the_written_model_gives_the_logits_of_the_run(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    def gated(assembly: Any) -> None:
        assert isinstance(assembly.mix, Gated)

    opened = exports(tiny_bert, silos, tmp_path, gated, **JOB)
    newcomer = opened.prepared.clients["site-0"]
    assembly = opened.method.personal(
        newcomer, welcomed(opened.method, opened.state, newcomer), OwnAndGates()
    )
    assert [term.name for term in assembly.terms] == ["rest"]
    assert assembly.mix.linear


def test_an_even_gate_is_a_plain_peft_adapter(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    exports(
        tiny_bert, silos, tmp_path, method={"name": "fedalt", "gate": "even"}, run={"rounds": 2}
    )
    assert any(name.endswith("adapter_model.safetensors") for name in files(tmp_path / "out"))


@pytest.mark.parametrize("options", [{"gate": "even"}, {"gate": "own"}])
def test_with_its_options_it_keeps_what_a_method_promises(options: dict[str, Any]) -> None:
    satisfies(FedALT, **options)
