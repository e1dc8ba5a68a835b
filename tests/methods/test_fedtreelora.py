"""FedTreeLoRA's arithmetic (methods.md A1) without a model: training is replaced by planted or
random changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, Site
from fedgrove.adapters.assembly import Assembly, Convex, as_one_adapter
from fedgrove.adapters.private import is_private, seal
from fedgrove.adapters.tree import numbers, pack, typed, unpack
from fedgrove.ground.errors import JobError
from fedgrove.job import Job
from fedgrove.methods.contract import ClientInfo, Setting, Step, Trained, Update, reveal
from fedgrove.methods.fedtreelora import (
    FedTreeLoRA,
    Kept,
    Paths,
    Probe,
    TreeOptions,
    TreeState,
    Upload,
)
from fedgrove.training.client import carry

LAYERS = 4
SITES = {
    f"layer.{layer}.{part}": Site(f"layer.{layer}.{part}", layer, 6, 5)
    for layer in range(LAYERS)
    for part in ("query", "value")
}
Drift = Callable[[str, int], float]  # (client, layer) -> where its B goes


def method(rounds: int = 9, **options: Any) -> Any:
    return FedTreeLoRA(
        TreeOptions(**options), Setting(sites=SITES, rank=2, alpha=4.0, rounds=rounds, seed=5)
    )


def info(name: str, examples: int = 10) -> ClientInfo:
    return ClientInfo(name, 2, examples)


def names(count: int) -> list[str]:
    return [f"c{index:02d}" for index in range(count)]


def drawn(seed: int, size: float = 1.0) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(2, 6, generator=rng), size * torch.randn(5, 2, generator=rng), 2.0
        )
        for name in SITES
    }


def arrived(
    adapters: Mapping[str, Adapter], examples: Mapping[str, int] | None = None
) -> list[Update]:
    return [Update(n, (examples or {}).get(n, 10), Upload(a)) for n, a in sorted(adapters.items())]


def after_warmup(chosen: FedTreeLoRA, adapters: Mapping[str, Adapter], **more: Any) -> Any:
    """The state after a warm-up that ended in these adapters."""
    state = chosen.begin([info(name) for name in adapters])
    return chosen.aggregate(state, chosen.warmup, arrived(adapters, **more))


class Field:
    """Clients whose training is made up: B drifts to a place of the client's own, everything else
    jitters.
    """

    def __init__(self, chosen: FedTreeLoRA, drift: Drift | None = None):
        self.method, self.drift = chosen, drift or (lambda name, layer: 0.0)
        self.mine: dict[str, Any] = {}
        self.sent: list[Any] = []  # everything that went up or down
        self.done: dict[str, list[Trained]] = {}

    def train(self, step: Step, client: str, rng: torch.Generator) -> Trained:
        def moved(value: Tensor, by: float = 0.0) -> Tensor:
            return value + by + 0.01 * torch.randn(value.shape, generator=rng)

        terms = []
        for term in step.assembly.terms:
            adapter = {
                site: Factors(
                    moved(f.A), moved(f.B, self.drift(client, SITES[site].layer)), f.scale
                )
                for site, f in term.adapter.items()
            }
            terms.append(replace(term, adapter=adapter) if term.train else term)
        extras = {
            name: replace(
                extra,
                value=seal(moved(extra.value, 0.5))
                if extra.home == "client"
                else moved(extra.value),
            )
            for name, extra in step.assembly.extras.items()
        }
        return Trained(replace(step.assembly, terms=tuple(terms), extras=extras), 1.0, 1)

    def client(self, name: str, offer: Paths, round: int) -> Update:
        rng = torch.Generator().manual_seed(hash_of(name, round))
        done: list[Trained] = []
        for step in self.method.plan(info(name), offer, self.mine.get(name, Kept()), round):
            assert isinstance(step, Step)
            done.append(self.train(carry(step, done), name, rng))
        self.done[name] = done
        content, self.mine[name] = self.method.report(
            info(name), done, offer, self.mine.get(name, Kept()), round
        )
        self.mine[name] = typed(Kept, unpack(pack(self.mine[name], private=True)))
        return Update(name, 10, content)

    def round(self, state: TreeState, number: int, clients: Sequence[str]) -> Any:
        updates = []
        for name in clients:
            offer = typed(Paths, unpack(pack(self.method.offer(state, number, info(name)))))
            updates.append(self.client(name, offer, number))
            self.sent += [offer, updates[-1].content]
        return typed(TreeState, unpack(pack(self.method.aggregate(state, number, updates))))


def hash_of(*keys: object) -> int:
    return sum((index + 1) * sum(map(ord, str(key))) for index, key in enumerate(keys))


def said(record: Any) -> set[str]:
    """The fields of a message that say something."""
    return {name for name, value in vars(record).items() if value not in (None, False, "", {})}


def groups(state: TreeState, chosen: FedTreeLoRA) -> list[set[frozenset[str]]]:
    layers = chosen.artefacts(state)["tree.json"]["layers"]
    return [{frozenset(group) for group in layer["groups"]} for layer in layers]


# ------------------------------------------------------------ an independent reading of A1, in
# float64 and with loops
def slow_distances(adapters: Sequence[Adapter], distance: str) -> list[list[list[float]]]:
    def between(one: Tensor, other: Tensor) -> float:
        x, y = one.double().flatten().tolist(), other.double().flatten().tolist()
        if distance == "frobenius":
            return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
        dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
        return 1 - dot / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))

    return [
        [
            [
                sum(
                    between(p[f"layer.{layer}.{part}"].B, q[f"layer.{layer}.{part}"].B)
                    for part in ("query", "value")
                )
                / 2
                for q in adapters
            ]
            for p in adapters
        ]
        for layer in range(LAYERS)
    ]


def slow_tree(layers: list[list[list[float]]], linkage: str) -> dict[int, list[frozenset[int]]]:
    """The groups of the global tree's cut into c, for every c."""
    count = len(layers[0])
    D = [
        [sum(layer[i][j] for layer in layers) / len(layers) for j in range(count)]
        for i in range(count)
    ]
    how: dict[str, Callable[[list[float]], float]] = {
        "average": lambda v: sum(v) / len(v),
        "complete": max,
        "single": min,
    }
    now = [frozenset([i]) for i in range(count)]
    cuts = {count: now}
    while len(now) > 1:
        one, other = min(
            itertools.combinations(now, 2),
            key=lambda pair: how[linkage]([D[i][j] for i in pair[0] for j in pair[1]]),
        )
        now = [group for group in now if group not in (one, other)] + [one | other]
        cuts[len(now)] = now
    return cuts


def slow_silhouette(parts: list[frozenset[int]], D: list[list[float]]) -> float:
    values = []
    for own in parts:
        for i in own:
            if len(own) == 1:
                values.append(0.0)
                continue
            a = sum(D[i][j] for j in own) / (len(own) - 1)
            b = min(sum(D[i][j] for j in other) / len(other) for other in parts if other != own)
            values.append((b - a) / max(a, b))
    return sum(values) / len(values)


def slow_cuts(
    adapters: Sequence[Adapter], tau: float, K: int, distance: str, linkage: str
) -> list[set[frozenset[int]]]:
    layers = slow_distances(adapters, distance)
    cuts = slow_tree(layers, linkage)
    found, before = [], 1
    for D in layers:
        scores = {
            c: tau if c == 1 else slow_silhouette(cuts[c], D)
            for c in range(before, min(len(adapters), before + K))
        }
        before = max(scores, key=lambda c: (scores[c], -c))
        found.append(set(cuts[before]))
    return found


def slow_experts(
    adapters: Mapping[str, Adapter],
    group: frozenset[str],
    weights: Mapping[str, int],
    site: str,
    letter: str,
) -> tuple[Tensor, Tensor | None]:
    def mean(chosen: list[str]) -> Tensor:
        total = sum(weights[name] for name in chosen)
        return torch.stack(
            [weights[n] / total * getattr(adapters[n][site], letter).double() for n in chosen]
        ).sum(0)

    others = [name for name in adapters if name not in group]
    return mean(sorted(group)), mean(others) if others else None


# ------------------------------------------------------------ tree and cuts
@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("distance", ["frobenius", "cosine"])
@pytest.mark.parametrize(
    ("seed", "tau", "K"), [(0, -1.0, 3), (1, 0.02, 3), (2, -1.0, 2), (3, 0.05, 5)]
)
def test_tree_cuts_and_experts_are_what_the_paper_says(
    seed: int, tau: float, K: int, distance: Any, linkage: Any
) -> None:
    sizes = [1.0, 1e-3, 30.0, 1.0, 1.0, 2.0, 1.0, 0.5, 1.0]
    adapters = {
        name: drawn(100 * seed + i, size)
        for i, (name, size) in enumerate(zip(names(9), sizes, strict=True))
    }
    examples = {name: 3 + 7 * i for i, name in enumerate(adapters)}
    for weights in ("uniform", "examples"):
        chosen = method(tau=tau, K=K, distance=distance, linkage=linkage, weights=weights)
        state = after_warmup(chosen, adapters, examples=examples)
        want = slow_cuts(list(adapters.values()), tau, K, distance, linkage)
        found = groups(state, chosen)
        assert found == [
            {frozenset(names(9)[i] for i in group) for group in layer} for layer in want
        ]
        shares = dict.fromkeys(adapters, 1) if weights == "uniform" else examples
        for name in adapters:
            offer = chosen.offer(state, 4, info(name))
            for site, where in SITES.items():
                own = next(group for group in found[where.layer] if name in group)
                for letter in "AB":
                    cluster, external = slow_experts(adapters, own, shares, site, letter)
                    close(getattr(offer.cluster[site], letter), cluster)
                    if external is None:
                        assert site not in (offer.external or {})
                    else:
                        close(getattr(offer.external[site], letter), external)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 9),
    tau=st.floats(-1, 0.5),
    K=st.integers(1, 5),
    distance=st.sampled_from(["frobenius", "cosine"]),
    linkage=st.sampled_from(["average", "complete", "single", "weighted"]),
    twins=st.booleans(),
)
def test_groups_are_nested_over_layers_for_any_input(
    seed: int, count: int, tau: float, K: int, distance: Any, linkage: Any, twins: bool
) -> None:
    chosen = method(tau=tau, K=K, distance=distance, linkage=linkage)
    adapters = {n: drawn(seed + (i // 2 if twins else i)) for i, n in enumerate(names(count))}
    state = after_warmup(chosen, adapters)
    layers = chosen.artefacts(state)["tree.json"]["layers"]
    found = groups(state, chosen)
    before, limit = {frozenset(names(count))}, 1
    for layer, now in zip(layers, found, strict=True):
        assert set().union(*now) == set(adapters)
        assert sum(map(len, now)) == count
        assert all(any(fine <= coarse for coarse in before) for fine in now)
        assert len(now) == layer["count"] <= min(max(1, count - 1), limit + K - 1)
        before, limit = now, layer["count"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(8)))
def test_permuting_the_clients_permutes_the_result(seed: int, order: list[int]) -> None:
    chosen = method(tau=-1.0)
    adapters = [drawn(seed + i) for i in range(8)]
    first = after_warmup(chosen, dict(zip(names(8), adapters, strict=True)))
    second = after_warmup(
        chosen, {name: adapters[i] for name, i in zip(names(8), order, strict=True)}
    )
    renamed = {name: names(8)[i] for name, i in zip(names(8), order, strict=True)}
    back = [
        {frozenset(renamed[name] for name in group) for group in layer}
        for layer in groups(second, chosen)
    ]
    assert back == groups(first, chosen)
    for name, other in renamed.items():
        one, two = chosen.offer(second, 4, info(name)), chosen.offer(first, 4, info(other))
        for term in ("cluster", "external"):
            for site in SITES:
                close(getattr(one, term)[site].B, getattr(two, term)[site].B.double())


def planted(name: str, layer: int) -> float:
    """Layer 0 sees no groups, layer 1 two of them, layers 2 and 3 four."""
    number = int(name[1:]) % 4
    return [
        0.0,
        1.0 * (number // 2),
        1.0 * (number // 2) + 0.4 * (number % 2),
        3.0 * (number // 2) + number % 2,
    ][layer]


def test_planted_groups_are_recovered_layer_by_layer() -> None:
    chosen = method(tau=0.3, rounds=6)
    field, state = Field(chosen, planted), chosen.begin([])
    for number in (1, 2):
        state = field.round(state, number, names(12))
    two = {frozenset(n for n in names(12) if int(n[1:]) % 4 // 2 == half) for half in (0, 1)}
    four = {frozenset(n for n in names(12) if int(n[1:]) % 4 == rest) for rest in range(4)}
    assert groups(state, chosen) == [{frozenset(names(12))}, two, four, four]
    content = chosen.artefacts(state)["tree.json"]
    assert [layer["count"] for layer in content["layers"]] == [1, 2, 4, 4]
    assert [layer["layer"] for layer in content["layers"]] == [0, 1, 2, 3]
    assert content["clients"] == names(12)
    assert len(content["merges"]) == 11
    assert all(len(row) == 4 for row in content["merges"])


def test_one_client_and_two_clients_share_everything() -> None:
    for count in (1, 2):
        chosen = method(tau=-1.0)
        adapters = {name: drawn(i) for i, name in enumerate(names(count))}
        state = typed(TreeState, unpack(pack(after_warmup(chosen, adapters))))
        assert groups(state, chosen) == [{frozenset(names(count))}] * LAYERS
        assert said(chosen.offer(state, 4, info("c00"))) == {"cluster"}
        joined = chosen.welcome(
            state, info("new"), Probe({site: f.B for site, f in drawn(9).items()})
        )
        assert said(joined) == {"cluster", "placed"}


# ------------------------------------------------------------ rounds, clients
def test_the_warm_up_is_local_counts_in_the_budget_and_travels_once() -> None:
    chosen = method(rounds=7)  # 7 // 3
    assert chosen.warmup == 2
    field, state = Field(chosen), chosen.begin([])
    assert chosen.select(state, 2, names(10), 0.2) == names(10)
    assert len(chosen.select(state, 3, names(10), 0.2)) == 2
    first = field.round(state, 1, names(4))
    assert [said(each) for each in field.sent] == [set(), set()] * 4
    alone = {name: field.mine[name].own for name in names(4)}
    for name in names(4):
        assert (
            chosen.personal(info(name), Paths(), field.mine[name]).adapter("own")["layer.0.query"]
            is alone[name]["layer.0.query"]
        )
    second = field.round(first, 2, names(4))
    assert [said(each) for each in field.sent[8:]] == [set(), {"adapter"}] * 4
    for name in names(
        4
    ):  # the second round went on from the first, and its result is what the server holds
        assert torch.equal(
            second.latest[name]["layer.3.value"].B, field.mine[name].own["layer.3.value"].B
        )
        assert not torch.equal(
            field.mine[name].own["layer.3.value"].B, alone[name]["layer.3.value"].B
        )
        assert (
            field.mine[name].own["layer.3.value"].B - alone[name]["layer.3.value"].B
        ).abs().max() < 0.1
    field.round(second, 3, names(4))
    assert all(tree.cluster is not None for tree in field.sent[16::2])


def test_lambda_is_one_private_number_per_split_layer() -> None:
    chosen = method(rounds=6, tau=0.3)
    field, state = Field(chosen, planted), chosen.begin([])
    for number in (1, 2):
        state = field.round(state, number, names(12))
    offer = chosen.offer(state, 3, info("c05"))
    (step,) = chosen.plan(info("c05"), offer, field.mine["c05"], 3)
    assembly = step.assembly
    assert set(assembly.extras) == {
        "lambda.1",
        "lambda.2",
        "lambda.3",
    }  # layer 0 is whole: pinned to 1
    assert all(
        e.value.shape == () and e.value == 0 and e.home == "client"
        for e in assembly.extras.values()
    )
    assert {term.name: term.train for term in assembly.terms} == {"cluster": "ABM", "external": ""}
    assert {SITES[site].layer for site in assembly.adapter("external")} == {1, 2, 3}
    state = field.round(state, 3, names(12))
    kept = field.mine["c05"].logits
    assert set(kept) == {"1", "2", "3"}
    assert all(is_private(value) for value in kept.values())
    again = chosen.personal(info("c05"), chosen.offer(state, 4, info("c05")), field.mine["c05"])
    assert [float(again.extras[f"lambda.{n}"].value) for n in (1, 2, 3)] == pytest.approx(
        [0.5] * 3, abs=0.1
    )
    shown = chosen.client_artefacts(info("c05"), offer, field.mine["c05"])["tree.json"]["lambda"]
    logits = reveal(kept)
    assert shown == {
        n: {"c05": pytest.approx(1 / (1 + math.exp(-float(logits[n]))))} for n in ("1", "2", "3")
    }
    assert chosen.artefacts(state)["tree.json"]["lambda"] == {
        "0": dict.fromkeys(names(12), 1.0),
        "1": {},
        "2": {},
        "3": {},
    }


def test_what_runs_is_lambda_of_the_group_and_the_rest_of_everyone_else() -> None:
    chosen = method(rounds=6, tau=0.3)
    field, state = Field(chosen, planted), chosen.begin([])
    for number in (1, 2, 3):
        state = field.round(state, number, names(12))
    offer = chosen.offer(state, 4, info("c02"))
    assembly = chosen.personal(info("c02"), offer, field.mine["c02"])
    assert assembly.mix == Convex("cluster", "external")
    found = as_one_adapter(assembly, SITES)
    for site, where in SITES.items():
        logit = reveal(field.mine["c02"]).logits.get(str(where.layer))
        share = 1.0 if logit is None else float(torch.sigmoid(logit.double()))
        cluster = offer.cluster[site]
        want = share * 2.0 * cluster.B.double() @ cluster.A.double()
        if share < 1:
            external = offer.external[site]
            want += (1 - share) * 2.0 * external.B.double() @ external.A.double()
        close(found[site].product(), want)


def test_no_lambda_is_in_anything_that_travels() -> None:
    chosen = method(rounds=8, tau=0.3)
    field, state = Field(chosen, planted), chosen.begin([])
    secrets: set[bytes] = set()
    for number in range(1, 9):
        state = field.round(state, number, names(8))
        for mine in field.mine.values():
            for value in reveal(mine.logits).values():
                secrets |= {value.numpy().tobytes(), torch.sigmoid(value).numpy().tobytes()}
    assert len(secrets) > 100
    blobs = [pack(tree) for tree in field.sent] + [pack(state)]  # pack refuses what is sealed, too
    assert not any(b"lambda" in blob for blob in blobs)
    words = {blob[start : start + 4] for blob in blobs for start in range(0, len(blob) - 3, 4)}
    assert not secrets & words
    own = [pack(mine, private=True) for mine in field.mine.values()]
    assert any(secret in blob for blob in own for secret in secrets)  # the search can find one


def test_absent_members_count_with_their_last_adapter() -> None:
    chosen = method(rounds=6, tau=0.3)
    field, state = Field(chosen, planted), chosen.begin([])
    for number in (1, 2):
        state = field.round(state, number, names(8))
    before = state
    state = field.round(state, 3, ["c01", "c05", "c06"])
    for name in names(8):
        changed = not torch.equal(
            before.latest[name]["layer.1.query"].A, state.latest[name]["layer.1.query"].A
        )
        assert changed == (name in ("c01", "c05", "c06"))
    assert groups(state, chosen) == groups(before, chosen)
    offer, two = chosen.offer(state, 4, info("c04")), {"c00", "c01", "c04", "c05"}
    cluster, external = slow_experts(
        state.latest, frozenset(two), dict.fromkeys(names(8), 1), "layer.1.query", "B"
    )
    close(offer.cluster["layer.1.query"].B, cluster)
    assert external is not None
    close(offer.external["layer.1.query"].B, external)


@pytest.mark.parametrize("tree", [True, False])
def test_a_client_that_missed_the_warm_up_joins_in_one_round(tree: bool) -> None:
    chosen = method(rounds=9, tau=0.3, tree=tree)
    assert chosen.warmup == 3
    field, state = Field(chosen, planted), chosen.begin([])
    early = [name for name in names(12) if name != "c06"]
    for number in (1, 2, 3, 4):
        state = field.round(state, number, early)
    assert "c06" not in state.groups
    offer = chosen.offer(state, 5, info("c06"))
    assert numbers(offer) == 0
    assert (
        chosen.personal(info("c06"), offer, Kept())
        .adapter("own")["layer.0.query"]
        .B.count_nonzero()
        == 0
    )
    before = {name: state.experts[name] for name in state.experts}
    state = field.round(state, 5, ["c06"])
    assert len(field.done["c06"]) == 3  # as long as everyone's warm-up
    assert numbers(field.sent[-1]) == 10 * len(SITES)  # B alone
    four = {frozenset(n for n in names(12) if int(n[1:]) % 4 == rest) for rest in range(4)}
    assert groups(state, chosen)[2:] == [four, four]
    assert chosen.artefacts(state)["tree.json"]["joined"] == ["c06"]
    # Its warm-up is not averaged into groups that are further on; its first trained expert is.
    for layer, experts in state.experts.items():
        for new, old in zip(experts.cluster, before[layer].cluster, strict=True):
            assert all(torch.equal(new[site].B, old[site].B) for site in new)
    state = field.round(state, 6, ["c06"])
    own = frozenset({"c02", "c06", "c10"})
    cluster, _ = slow_experts(state.latest, own, dict.fromkeys(names(12), 1), "layer.3.value", "B")
    close(chosen.offer(state, 7, info("c02")).cluster["layer.3.value"].B, cluster)
    assert said(field.mine["c06"]) == {"logits"}


def test_a_client_that_missed_a_part_of_the_warm_up_makes_up_for_that_part() -> None:
    chosen = method(rounds=9, tau=0.3)
    field, state = Field(chosen, planted), chosen.begin([])
    state = field.round(state, 1, names(8))
    state = field.round(state, 2, names(8)[:-1])
    state = field.round(state, 3, names(8)[:-1])
    state = field.round(state, 4, names(8))
    assert len(field.done["c07"]) == 2
    assert groups(state, chosen)[3] == {
        frozenset(n for n in names(8) if int(n[1:]) % 4 == rest) for rest in range(4)
    }


def test_a_warm_up_that_nobody_finished_is_finished_by_those_who_come_next() -> None:
    chosen = method(rounds=9, tau=0.3)
    field, state = Field(chosen, planted), chosen.begin([])
    state = field.round(state, 1, names(8))
    assert chosen.artefacts(state) == {}
    state = field.round(state, 4, names(8))
    assert [len(done) for done in field.done.values()] == [2] * 8
    assert len(groups(state, chosen)[3]) == 4


@pytest.mark.parametrize("tree", [True, False])
def test_an_unseen_client_is_welcome_at_once_and_placed_by_its_probe(tree: bool) -> None:
    chosen = method(rounds=9, tau=0.3, tree=tree)
    field, state = Field(chosen, planted), chosen.begin([])
    everyone = names(13)[:12]
    for number in range(1, 10):
        state = field.round(state, number, everyone)
    newcomer = info("c13")  # of the kind of c01, c05, c09
    at_once = chosen.welcome(state, newcomer, None)
    assembly = chosen.personal(newcomer, at_once, Kept())
    mean = torch.stack([state.latest[name]["layer.2.query"].A.double() for name in everyone]).mean(
        0
    )
    close(assembly.adapter("cluster")["layer.2.query"].A, mean)
    steps = list(chosen.probe(newcomer, at_once) or [])
    assert len(steps) == 3
    assert len({step.stream for step in steps}) == 3
    start = chosen.setting.shared_draw()
    assert torch.equal(
        steps[0].assembly.adapter("own")["layer.0.query"].A, start["layer.0.query"].A
    )
    done: list[Trained] = []
    for step in steps:
        done.append(field.train(carry(step, done), "c13", torch.Generator().manual_seed(1)))
    sent = typed(Probe, unpack(pack(chosen.probe_report(newcomer, done, at_once))))
    assert numbers(sent) == 10 * len(SITES)
    offer = chosen.welcome(state, newcomer, sent)
    twin = chosen.offer(state, 10, info("c05"))
    branch = state.groups["c05"][3] + 1
    assert offer.placed == f"branch {branch} of 4 in layer 3, the deepest"
    assert said(twin) == {"cluster", "external"}
    assert said(offer) == {"cluster", "external", "placed"}
    for term in ("cluster", "external"):
        for site, factors in getattr(twin, term).items():
            if (
                SITES[site].layer > 0
            ):  # layer 0 has no groups but chance ones, which the ablation without a tree may find
                assert torch.equal(getattr(offer, term)[site].B, factors.B)
    assert "c13" not in state.groups


def test_the_way_of_a_newcomer_is_nested_like_everyones() -> None:
    chosen = method(tau=-1.0)
    state = after_warmup(chosen, {name: drawn(i) for i, name in enumerate(names(9))})
    for seed in range(30, 50):
        labels = chosen._placed(state, {site: f.B for site, f in drawn(seed).items()})
        path = [
            {n for n, own in state.groups.items() if own[place] == label}
            for place, label in enumerate(labels)
        ]
        assert all(fine <= coarse for coarse, fine in pairwise(path))


# ------------------------------------------------------------ options
def run_field(
    count: int = 8, rounds: int = 6, drift: Drift = planted, **options: Any
) -> tuple[FedTreeLoRA, Field, Any]:
    chosen = method(rounds=rounds, **{"tau": 0.3, **options})
    field, state = Field(chosen, drift), chosen.begin([])
    for number in range(1, rounds + 1):
        state = field.round(state, number, names(count))
    return chosen, field, state


def test_without_the_external_expert_only_the_groups_mean_runs() -> None:
    chosen, field, state = run_field(external=False)
    assert [len(layer) for layer in groups(state, chosen)] == [1, 2, 4, 4]
    offer = chosen.offer(state, 7, info("c03"))
    assert said(offer) == {"cluster"}
    assembly = chosen.personal(info("c03"), offer, field.mine["c03"])
    assert assembly.extras == {}
    assert [term.name for term in assembly.terms] == ["cluster"]


def test_a_fixed_count_is_the_same_in_every_layer() -> None:
    for k in (1, 3):
        chosen, _, state = run_field(fixed_k=k)
        assert [len(layer) for layer in groups(state, chosen)] == [k] * 4
    assert chosen.global_assembly(state) is None


def test_layers_alone_find_their_own_groups_nested_or_not() -> None:
    def crossed(name: str, layer: int) -> float:
        number = int(name[1:])
        return float(number % 2 if layer < 2 else number // 4)

    chosen, _, state = run_field(drift=crossed, tree=False)
    odd = {frozenset(n for n in names(8) if int(n[1:]) % 2 == half) for half in (0, 1)}
    high = {frozenset(n for n in names(8) if int(n[1:]) // 4 == half) for half in (0, 1)}
    assert groups(state, chosen) == [odd, odd, high, high]
    chosen, _, state = run_field(drift=crossed)
    assert groups(state, chosen) != [odd, odd, high, high]  # one tree cannot


def test_the_tree_is_built_anew_from_the_adapters_as_uploaded() -> None:
    def swapped(name: str, layer: int) -> float:
        """The two kinds only show once training goes on: the first two rounds see others."""
        return float(int(name[1:]) % 2) * (1.0 if clock["round"] <= 2 else 0.0) + (
            4.0 * (int(name[1:]) // 4) if clock["round"] > 2 else 0.0
        )

    clock = {"round": 0}
    odd = {frozenset(n for n in names(8) if int(n[1:]) % 2 == half) for half in (0, 1)}
    high = {frozenset(n for n in names(8) if int(n[1:]) // 4 == half) for half in (0, 1)}
    for every, want in ((0, [odd] * 5), (2, [odd, odd, high, high, high]), (4, [odd] * 4 + [high])):
        chosen = method(rounds=6, tau=0.3, K=2, rebuild_every=every)
        field, state = Field(chosen, swapped), chosen.begin([])
        found = []
        for number in range(1, 7):
            clock["round"] = number
            state = field.round(state, number, names(8))
            if number > 1:
                found.append(groups(state, chosen)[0])
        assert found == want


def test_distance_linkage_tau_and_k_change_the_cuts() -> None:
    adapters = {name: drawn(i, [1.0, 5.0, 0.3][i % 3]) for i, name in enumerate(names(10))}

    def found(**options: Any) -> Any:
        chosen = method(**{"tau": -1.0, **options})
        return groups(after_warmup(chosen, adapters), chosen)

    plain = found()
    assert found(distance="cosine") != plain
    assert found(linkage="single") != plain
    assert found(tau=0.9) != plain
    assert found(K=2, tau=0.05) != found(K=9, tau=0.05)
    assert [len(layer) for layer in found(K=1)] == [1] * 4


def test_lambda_lr_reaches_the_optimiser_as_a_multiple() -> None:
    chosen, field, state = run_field(lambda_lr=7.0)
    extras = chosen.personal(
        info("c01"), chosen.offer(state, 7, info("c01")), field.mine["c01"]
    ).extras
    assert {extra.lr for extra in extras.values()} == {7.0}


# ------------------------------------------------------------ K = 1, refusals
def test_never_splitting_without_warm_up_is_one_mean_from_the_first_round_on() -> None:
    chosen = method(rounds=4, K=1, warmup_rounds=0)
    field, state = Field(chosen), chosen.begin([])
    assert chosen.probe(info("c09"), Paths()) is None
    first = chosen.offer(state, 1, info("c00"))
    start = chosen.setting.shared_draw()
    assert said(first) == {"cluster"}
    assert list(first.cluster) == list(SITES)
    assert all(torch.equal(first.cluster[site].A, start[site].A) for site in SITES)
    state = field.round(state, 1, ["c00", "c01"])  # not everyone: there is no warm-up
    assert [said(chosen.offer(state, 2, info(name))) for name in names(3)] == [{"cluster"}] * 3
    state = field.round(state, 2, ["c01", "c02"])
    model = chosen.global_assembly(state)
    assert model is not None
    for site in SITES:
        mean = torch.stack([state.latest[name][site].B.double() for name in names(3)]).mean(0)
        close(model.adapter("cluster")[site].B, mean)
    assert groups(state, chosen) == [{frozenset(names(3))}] * 4


def test_the_warm_up_by_default() -> None:
    assert [method(rounds=rounds).warmup for rounds in (1, 2, 3, 8, 15, 90)] == [1, 1, 1, 2, 5, 5]
    assert [method(rounds=rounds, K=1).warmup for rounds in (1, 2, 3, 8)] == [0, 0, 1, 2]
    assert method(rounds=9, fixed_k=1, warmup_rounds=0).warmup == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_rounds": 0}, ["method.warmup_rounds = 0", "method.K = 1"]),
        ({"warmup_rounds": 0, "fixed_k": 4, "K": 1}, ["method.warmup_rounds = 0"]),
        ({"warmup_rounds": 0, "tree": False, "K": 1}, ["method.warmup_rounds = 0"]),
        ({"warmup_rounds": 7}, ["method.warmup_rounds = 7", "run.rounds = 6"]),
        ({"fixed_k": 4, "tree": False}, ["method.fixed_k = 4", "method.tree = false"]),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(JobError) as caught:
        method(rounds=6, **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_bad_keys_are_refused_by_the_job() -> None:
    for setting, key in (
        ("method.K=0", "method.K"),
        ("method.linkage='ward'", "method.linkage"),
        ("method.k=2", "method.K"),
    ):
        with pytest.raises(JobError, match=key):
            Job().override(["method.name=fedtreelora", setting])


def test_an_assembly_of_a_client_never_seen_runs_before_there_is_a_tree() -> None:
    chosen = method()
    state = chosen.begin([])
    for offer in (chosen.offer(state, 1, info("x")), chosen.welcome(state, info("x"), None)):
        assembly = chosen.personal(info("x"), offer, Kept())
        assert isinstance(assembly, Assembly)
        assert all(f.B.count_nonzero() == 0 for f in assembly.terms[0].adapter.values())


# ------------------------------------------------------------------ the external expert's renewal


def two_groups(**options: Any) -> tuple[Any, Any, dict[str, Adapter]]:
    """Four clients in two groups, after their warm-up."""
    chosen = method(fixed_k=2, warmup_rounds=1, **options)
    adapters = {}
    for index, name in enumerate(names(4)):
        side = 5.0 * (index // 2)
        adapters[name] = {
            site: Factors(factors.A, factors.B + side, factors.scale)
            for site, factors in drawn(index, 0.1).items()
        }
    return chosen, after_warmup(chosen, adapters), adapters


def mixed(offer: Any, site: str) -> Tensor:
    """What runs at λ = ½, for one shared A: ``(B_cluster + B_external) / 2``."""
    halves: Tensor = (offer.cluster[site].B + offer.external[site].B) / 2
    return halves


def trained_to(
    chosen: Any, state: TreeState, round: int, goals: Mapping[str, float]
) -> list[Update]:
    """Everyone trains its cluster's B until what it runs at λ = ½ is its goal, exactly."""
    updates = []
    for name, goal in goals.items():
        offer = chosen.offer(state, round, info(name))
        adapter = {
            site: Factors(factors.A, 2 * goal - offer.external[site].B, factors.scale)
            for site, factors in offer.cluster.items()
        }
        updates.append(Update(name, 10, Upload(adapter)))
    return updates


GOALS = {"c00": 1.0, "c01": 1.0, "c02": 3.0, "c03": 3.0}


def test_renewed_at_once_two_groups_deploy_one_model_that_swings() -> None:
    chosen, state, _ = two_groups()
    site = next(iter(SITES))
    deployed = []
    for round in range(2, 7):
        state = chosen.aggregate(state, round, trained_to(chosen, state, round, GOALS))
        one, other = (
            mixed(chosen.deploy(state, round, info(name)), site) for name in ("c00", "c02")
        )
        # each trained to a model of its own, and all deploy the same one
        torch.testing.assert_close(one, other)
        deployed.append(one)
    rest = 1.0 + 3.0  # the goals' sum: u' = 2 (goal_1 + goal_2) - u for u = C_1 + C_2
    for before, after in itertools.pairwise(deployed):
        torch.testing.assert_close(after, rest - before, rtol=1e-4, atol=1e-4)
    assert (deployed[0] - deployed[1]).abs().max() > 0.1


def test_deployed_with_what_it_was_trained_against_a_client_has_what_it_trained() -> None:
    chosen, state, _ = two_groups(external_update="previous")
    for round in range(2, 5):
        state = chosen.aggregate(state, round, trained_to(chosen, state, round, GOALS))
        for name, goal in GOALS.items():
            offer = chosen.deploy(state, round, info(name))
            for site in SITES:
                run = mixed(offer, site)
                torch.testing.assert_close(run, torch.full_like(run, goal), rtol=1e-4, atol=1e-4)
    last = chosen.offer(state, chosen.setting.rounds + 1, info("c00"))
    assert torch.equal(last.external[site].B, chosen.deploy(state, 9, info("c00")).external[site].B)


def test_the_first_experts_are_deployed_as_they_are_whatever_the_renewal() -> None:
    chosen, state, _ = two_groups(external_update="previous", external_damping=0.5)
    plain, other, _ = two_groups()
    for name in names(4):
        ours, published = chosen.deploy(state, 1, info(name)), plain.deploy(other, 1, info(name))
        for term in ("cluster", "external"):
            assert all(
                torch.equal(getattr(ours, term)[s].B, getattr(published, term)[s].B) for s in SITES
            )


def test_a_damped_external_expert_goes_only_a_part_of_the_way() -> None:
    chosen, state, _ = two_groups(external_damping=0.25)
    before = chosen.offer(state, 2, info("c00")).external
    updates = trained_to(chosen, state, 2, GOALS)
    after = chosen.offer(chosen.aggregate(state, 2, updates), 3, info("c00")).external
    others = [u.content.adapter for u in updates if u.client in ("c02", "c03")]
    for site in SITES:
        target = (others[0][site].B + others[1][site].B) / 2
        wanted = 0.25 * before[site].B + 0.75 * target
        torch.testing.assert_close(after[site].B, wanted, rtol=1e-5, atol=1e-5)


def test_half_damping_ends_the_swing_in_one_round() -> None:
    chosen, state, _ = two_groups(external_damping=0.5)
    site = next(iter(SITES))
    sums = []
    for round in range(2, 7):
        state = chosen.aggregate(state, round, trained_to(chosen, state, round, GOALS))
        offers = [chosen.offer(state, round + 1, info(name)) for name in ("c00", "c02")]
        sums.append(sum(offer.external[site].B for offer in offers))
    # the common mode of the external experts has the eigenvalue 1 - 2 (1 - damping) = 0
    for later in sums[1:]:
        torch.testing.assert_close(later, sums[0], rtol=1e-4, atol=1e-4)


def test_where_no_layer_is_split_there_is_nothing_to_damp() -> None:
    chosen = method(tau=2.0, warmup_rounds=1, external_damping=0.5, external_update="previous")
    state = after_warmup(chosen, {name: drawn(index) for index, name in enumerate(names(3))})
    again = chosen.aggregate(state, 2, arrived({name: drawn(7) for name in names(3)}))
    assert chosen.deploy(again, 2, info("c00")).external is None
