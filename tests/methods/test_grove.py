"""grove: each identity that its parts promise, planted trees, newcomers, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from tests.methods.kit import (
    SITES,
    aggregated,
    equal_runs,
    exports,
    info,
    method,
    near,
    offered,
    resumes,
    same,
    satisfies,
    watched,
    worked,
)
from tests.tiny import save_silos, tiny_job, without_reports

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, as_one_adapter
from fedgrove.adapters.groups import group_means
from fedgrove.adapters.private import PrivacyError
from fedgrove.adapters.tree import pack
from fedgrove.ground.errors import JobError
from fedgrove.methods import _leaf as leaf
from fedgrove.methods._leaf import Gate
from fedgrove.methods.contract import Trained, Update
from fedgrove.methods.grove import Changed, Evidence, Grove, GroveState, Modules, Own, Tree
from fedgrove.start import run
from fedgrove.wire.validate import fault, offer_fault

NAMES = [f"c{number}" for number in range(8)]


def moved(start: Adapter, seed: int, directions: dict[int, int], noise: float = 0.3) -> Adapter:
    """What a client makes of a path: its B moves along its group's own direction in each layer."""
    own = torch.Generator().manual_seed(seed)
    result: Adapter = {}
    for site, factors in start.items():
        group = torch.Generator().manual_seed(900 + directions[SITES[site].layer])
        along = torch.randn(factors.B.shape, generator=group)
        away = noise * torch.randn(factors.B.shape, generator=own)
        result[site] = Factors(factors.A, factors.B + along + away, factors.scale)
    return result


#: One group in the first two layers, two in the third, four in the last.
PLANTED = {layer: [0] * 8 for layer in (0, 1)}
PLANTED |= {2: [20 + number // 4 for number in range(8)]}
PLANTED |= {3: [30 + number // 2 for number in range(8)]}


def planted(name: str) -> dict[int, int]:
    return {layer: labels[NAMES.index(name)] for layer, labels in PLANTED.items()}


def grown(
    chosen: Any,
    order: list[str] = NAMES,
    rounds: int = 4,
) -> GroveState:
    """The state after the root's rounds, in which clients moved as planted."""
    state = chosen.begin([info(name) for name in order])
    for round in range(1, rounds + 1):
        updates = []
        for name in sorted(order):
            start = offered(chosen, state, round, info(name)).path
            rank = next(iter(start.values())).rank
            trained = moved(start, 100 * round + NAMES.index(name), planted(name))
            updates.append(Update(name, 10, Modules(trained, list(range(rank)))))
        state = aggregated(chosen, state, round, updates)
    return state


# ---------------------------------------------------------------------- identities
def test_one_node_and_full_budgets_are_fedit_bit_for_bit(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    ours = {"name": "grove", "root_share": 1.0}
    equal_runs(tiny_bert, silos, tmp_path, ours, {"name": "fedit", "weights": "uniform"})


def test_one_node_and_mixed_budgets_are_fed_plora_bit_for_bit(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    ours = {"name": "grove", "root_share": 1.0}
    mixed: dict[str, Any] = {"federation": {"ranks": [1, 2, 4]}, "run": {"rounds": 4}}
    equal_runs(tiny_bert, silos, tmp_path, ours, {"name": "fed-plora"}, **mixed)


def test_without_root_modules_it_is_fedtreelora_s_cluster_experts() -> None:
    """Each layer's branch is the uniform mean of A and of B over the group, and no more."""
    chosen = method("grove", rounds=8, root_share=0.0, root_rounds=4)
    state = grown(chosen)
    assert state.tree is not None
    given = {
        name: moved(offered(chosen, state, 5, info(name)).path, n, planted(name))
        for n, name in enumerate(NAMES)
    }
    updates = [Update(name, 10, Modules(given[name], [0, 1, 2])) for name in NAMES]
    after = aggregated(chosen, state, 5, updates)
    for place, layer in enumerate(after.tree.layers):
        sites = [site for site in SITES if SITES[site].layer == layer.layer]
        labels = [after.groups[name][place] for name in NAMES]
        parts = [{site: given[name][site] for site in sites} for name in NAMES]
        experts = group_means(parts, labels, [1.0] * 8).own
        for group in range(layer.count):
            near(layer.branches[group], experts[group])


def test_in_cascade_it_is_hilora_s_root_and_cluster_with_means_of_factors() -> None:
    """The frozen root stays as the last root round left it; a cluster is the mean of its members."""
    chosen = method("grove", rounds=8, root_rounds=4, together=False, rank=4)
    state = grown(chosen)
    assert state.tree is not None
    offer = offered(chosen, state, 5, info("c0"))
    assert offer.first == 2
    trained = {}
    for number, name in enumerate(NAMES):
        path = offered(chosen, state, 5, info(name)).path
        branch = {s: Factors(f.A[2:], f.B[:, 2:], f.scale) for s, f in path.items()}
        trained[name] = moved(branch, number, planted(name))
    updates = [Update(name, 10, Modules(trained[name], [2, 3])) for name in NAMES]
    after = aggregated(chosen, state, 5, updates)
    assert same(after.root, state.root)
    for place, layer in enumerate(after.tree.layers):
        for group in range(layer.count):
            members = [trained[n] for n in NAMES if after.groups[n][place] == group]
            whole = mean(members)
            near(layer.branches[group], {site: whole[site] for site in layer.branches[group]})


def test_growth_changes_no_client_s_function() -> None:
    """n_init = 0: branches appear with B = 0, so what a client starts from computes what it had."""
    chosen = method("grove", rounds=8, root_rounds=4, rank=4)
    state = grown(chosen)
    for name in NAMES:
        path = offered(chosen, state, 5, info(name)).path
        for site, factors in path.items():
            old = state.root[site]
            assert factors.rank == 4
            assert old.rank == 2
            torch.testing.assert_close(factors.product(), old.product(), rtol=0, atol=0)


# -------------------------------------------------------------------------- growth
@pytest.mark.parametrize("evidence", ["subspace", "change"])
@pytest.mark.parametrize("test", [{"level": 0.05}, {"tau": 0.1}])
def test_a_planted_tree_is_found(evidence: str, test: dict[str, Any]) -> None:
    chosen = method("grove", rounds=8, root_rounds=4, rank=4, evidence=evidence, **test)
    state = grown(chosen)
    assert state.tree is not None
    deepest = state.tree.layers[-1]
    assert deepest.count >= 3
    found = [set(np.array(PLANTED[3])[np.array(deepest.labels) == g]) for g in range(deepest.count)]
    assert sum(len(each) for each in found) == 4  # no planted pair is torn apart
    halves = [{(label - 30) // 2 for label in each} for each in found]
    assert all(len(each) == 1 for each in halves)  # nor those together that the layer above parts
    for above, below in pairwise(state.tree.layers):
        parents = {pair[1]: pair[0] for pair in zip(above.labels, below.labels, strict=True)}
        assert [parents[label] for label in below.labels] == above.labels  # nested


def test_permuting_clients_permutes_the_result() -> None:
    chosen = method("grove", rounds=8, root_rounds=4, rank=4)
    plain = grown(chosen)
    names = {name: f"z{9 - NAMES.index(name)}" for name in NAMES}
    state = chosen.begin([info(name) for name in names.values()])
    for round in range(1, 5):
        updates = []
        for name in NAMES:
            start = offered(chosen, state, round, info(names[name])).path
            trained = moved(start, 100 * round + NAMES.index(name), planted(name))
            updates.append(Update(names[name], 10, Modules(trained, [0, 1])))
        state = aggregated(chosen, state, round, sorted(updates, key=lambda u: u.client))
    near(plain.root, state.root)
    assert plain.tree is not None
    for place in range(len(plain.tree.layers)):
        one = [plain.groups[name][place] for name in NAMES]
        other = [state.groups[names[name]][place] for name in NAMES]
        assert adjusted_rand_score(one, other) == 1.0


def test_a_newcomer_and_a_late_client_descend_to_their_groups() -> None:
    chosen = method("grove", rounds=8, root_rounds=4, rank=4)
    state = grown(chosen)
    start = chosen.welcome(state, info("new"), None)
    after = moved(start.path, 77, planted("c5"))
    change = {site: after[site].B - f.B for site, f in start.path.items()}
    offer = chosen.welcome(state, info("new"), Changed(change))
    assert "branch" in offer.placed
    own = offered(chosen, state, 9, info("c5")).path
    assert same(offer.path, own)
    late = Update("late", 10, Modules(moved(state.root, 78, planted("c2")), [0, 1]))
    later = aggregated(chosen, state, 5, [late])
    assert later.groups["late"] == later.groups["c2"]
    near({s: later.root[s] for s in later.root}, late.content.modules)


def test_absent_clients_keep_a_node_as_it_is() -> None:
    chosen = method("grove", rounds=8, root_rounds=4, rank=4)
    state = grown(chosen)
    path = offered(chosen, state, 5, info("c0")).path
    only = Update("c0", 10, Modules(path, [0, 1, 2, 3]))
    after = aggregated(chosen, state, 5, [only])
    for before, layer in zip(state.tree.layers, after.tree.layers, strict=True):  # type: ignore[union-attr]
        for group in range(layer.count):
            near(layer.branches[group], before.branches[group])


# ---------------------------------------------------------------------------- leaf
def leafy(**options: Any) -> tuple[Any, GroveState]:
    """A grown grove of rank 4 whose last two of eight rounds are the leaves'."""
    chosen = method("grove", rounds=8, root_rounds=4, rank=4, leaf_rounds=2, **options)
    return chosen, grown(chosen)


def product(assembly: Assembly) -> Adapter:
    return as_one_adapter(assembly, SITES)


def test_a_new_leaf_changes_no_client_s_function() -> None:
    """The first step of a leaf's first round computes what the path computed."""
    chosen, state = leafy()
    offer = offered(chosen, state, 7, info("c0"))
    step = next(chosen.plan(info("c0"), offer, Own(), 7))
    path = product(chosen.personal(info("c0"), offer, Own()))
    for site, factors in product(step.assembly).items():
        torch.testing.assert_close(factors.product(), path[site].product(), rtol=0, atol=1e-6)
    trained = {term.name: (term.train, term.home) for term in step.assembly.terms}
    assert trained == {"root": ("", "server"), "branch": ("", "server"), "leaf": ("ABM", "client")}


def test_the_leaves_rounds_send_nothing_and_change_nothing() -> None:
    chosen, state = leafy()
    offer = offered(chosen, state, 7, info("c0"))
    steps = worked(chosen.plan(info("c0"), offer, Own(), 7), 1)
    sent, mine = chosen.report(info("c0"), steps, offer, Own(), 7)
    assert (sent.modules, sent.indices, mine.gates) == ({}, [], {})
    with pytest.raises(PrivacyError):
        pack(mine)
    assert aggregated(chosen, state, 7, [Update("c0", 10, sent)]) is state


def test_a_leaf_has_no_more_modules_than_its_client_can_train() -> None:
    chosen, state = leafy(leaf_rank=3)
    for budget, modules in ((1, 1), (4, 3)):
        client = info("c0", rank=budget)
        step = next(chosen.plan(client, offered(chosen, state, 7, client), Own(), 7))
        assert {f.rank for f in step.assembly.adapter("leaf").values()} == {modules}


def gated(loss: Callable[[Mapping[int, Gate]], float]) -> dict[int, Gate]:
    """What a client chooses whose held-out loss is that of its gates."""
    steps = leaf.gate_steps(Assembly(), list(range(6)))
    done = [Trained(Assembly(), 0.0, 1)]
    step = next(steps)
    found: dict[int, Gate] = {}
    while not found:
        assert (step.measure, step.part) == ("loss", leaf.HELD)
        mix = step.assembly.mix
        assert isinstance(mix, leaf.Gated)
        done.append(Trained(step.assembly, loss({n: mix.gates[n] for n in range(6)}), 0))
        try:
            step = steps.send(done[-1])
        except StopIteration as stop:
            found = stop.value
    assert leaf.gates_of(done, list(range(6))) == found  # the report finds the same
    return found


def test_the_gate_is_the_best_on_held_out_rows_and_shrinks_stretches_to_all() -> None:
    assert gated(lambda gates: 1.0) == dict.fromkeys(range(6), (1.0, 0.0))  # a tie: no leaf
    nothing = gated(lambda gates: sum(branch + own for branch, own in gates.values()))
    assert nothing == dict.fromkeys(range(6), (0.0, 0.0))  # the root alone
    whole = gated(lambda gates: -sum(branch + own for branch, own in gates.values()))
    assert whole == dict.fromkeys(range(6), (1.0, 1.0))

    def deep(gates: Mapping[int, Gate]) -> float:
        """The leaf hurts above the fourth layer by half of what it helps below."""
        return sum(own * (0.5 if layer < 4 else -2.0) for layer, (_, own) in gates.items())

    found = gated(deep)
    assert [found[layer][1] for layer in range(6)] == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [
        {"root_share": 0.0, "tau": 0.01},
        {"root_share": 0.5, "tau": 0.01, "together": False},
        {"root_share": 1.0, "leaf_rounds": 1},
        {"root_rounds": 2, "leaf_rounds": 2, "leaf_rank": 9, "tau": 0.01},
        {"leaf_rounds": 5},
    ],
)
def test_every_option_s_messages_pass_the_wire_s_check(options: dict[str, Any]) -> None:
    satisfies(Grove, rounds=6, **options)
    chosen = method("grove", **options)
    clients = [info(f"c{number}", rank=1 + number % 3) for number in range(6)]
    state = chosen.begin(clients)
    kept = {client.name: Own() for client in clients}
    for round in range(1, 7):
        updates = []
        for client in clients:
            offer = offered(chosen, state, round, client)
            assert offer_fault({"method": offer}, method=chosen) is None
            steps = worked(chosen.plan(client, offer, kept[client.name], round), round)
            sent, own = chosen.report(client, steps, offer, kept[client.name], round)
            assert fault({"method": sent}, method=chosen, head={}) is None
            kept[client.name] = own
            updates.append(Update(client.name, 10, sent))
        state = aggregated(chosen, state, round, updates)


# ---------------------------------------------------------------------- whole runs
def test_a_run_with_leaves_resumes_and_exports_what_it_measured(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silos = save_silos(tmp_path / "silos", clients=6)
    chosen = {"name": "grove", "root_rounds": 2, "tau": 0.01, "leaf_rounds": 1}
    job: dict[str, Any] = {"federation": {"ranks": [2, 4]}, "run": {"rounds": 4}}
    resumes(tiny_bert, silos, tmp_path, [(3, 1), (4, 1)], method=chosen, **job)
    shown = json.loads((tmp_path / "whole" / "grove.json").read_text())
    assert shown["gates"]
    wire = watched(monkeypatch)
    with without_reports():
        opened = exports(tiny_bert, silos, tmp_path, method=chosen, run={"rounds": 4})
    assert wire.private
    assert not wire.leaks()
    assert any(mine.leaf for mine in wire.kept)
    assert opened.method.options.leaf_rounds == 1


def test_a_run_grows_resumes_and_shows_its_paths(tiny_bert: Path, tmp_path: Path) -> None:
    silos = save_silos(tmp_path / "silos", clients=6)
    chosen = {"name": "grove", "root_rounds": 2, "tau": 0.01}
    mixed: dict[str, Any] = {"federation": {"ranks": [2, 4]}, "run": {"rounds": 4}}
    resumes(tiny_bert, silos, tmp_path, [(1, 2), (3, 1)], method=chosen, **mixed)
    shown = json.loads((tmp_path / "whole" / "grove.json").read_text())
    assert shown["modules"] == {"root": 2, "branch": 2}
    assert {name for group in shown["layers"][0]["groups"] for name in group} <= {
        f"site-{n}" for n in range(6)
    }


def test_budgets_are_kept(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """A client of rank r sends r modules, of the root's two no more than two."""
    job = tiny_job(
        tiny_bert,
        silos,
        method={"name": "grove", "root_rounds": 2},
        federation={"ranks": [1, 2, 4]},
        run={"rounds": 3},
    )
    run(job, tmp_path / "out")
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    up = {(x["round"], x["client"]): x["bytes_up"] for x in lines if x["split"] == "train"}
    one = up[1, "site-0"]
    assert [up[1, f"site-{n}"] for n in range(3)] == [one, 2 * one, 2 * one]
    assert [up[3, f"site-{n}"] for n in range(3)] == [one, 2 * one, 4 * one]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"root_rounds": 9}, "root_rounds = 9 is more than run.rounds = 6"),
        ({"root_rounds": 2, "leaf_rounds": 5}, "leaf_rounds = 5 leaves 1 of run.rounds = 6"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        method("grove", **options)


def test_client_scaling_of_unequal_ranks_is_refused() -> None:
    chosen = method("grove")
    chosen.setting = replace(chosen.setting, scaling="client")
    with pytest.raises(JobError, match=r'lora\.scaling = "global"'):
        chosen.check([info("a", rank=1)])


def test_a_client_that_trained_once_has_one_measurement() -> None:
    chosen = method("grove", rounds=8, root_rounds=2, rank=4)
    state = chosen.begin([info(name) for name in NAMES])
    for round in (1, 2):
        present = NAMES if round == 1 else NAMES[:6]
        updates = [
            Update(n, 10, Modules(moved(state.root, 10 * round + i, planted(n)), [0, 1]))
            for i, n in enumerate(present)
        ]
        state = aggregated(chosen, state, round, updates)
    assert isinstance(state.tree, Tree)
    assert state.evidence["c7"].even == {}
    assert isinstance(state.evidence["c7"], Evidence)
    assert np.shape(state.tree.merges) == (7, 4)
