"""A rule gives the same in a run (the method's ``aggregate``) and on directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.aggregate.made import Array, dense, write
from tests.methods.kit import aggregated, offered
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, Site
from fedgrove.adapters.assembly import as_one_adapter
from fedgrove.adapters.tree import map_tensors
from fedgrove.aggregate import aggregate
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import ClientInfo, Setting, Update
from fedgrove.methods.records import Whole
from fedgrove.methods.registry import method_class

LAYERS = {"encoder.layer.0.query": (10, 7), "encoder.layer.1.query": (9, 8)}  # out, in
SITES = {
    name: Site(name, layer, into, out) for layer, (name, (out, into)) in enumerate(LAYERS.items())
}
ALPHA = 5.0
EXAMPLES = (5, 40, 17)


def draw(seed: int, rank: int, scale: float) -> Adapter:
    noise = generator(seed, "adapter")
    result = {}
    for name, site in SITES.items():
        A = torch.randn(rank, site.in_features, generator=noise, dtype=torch.float64)
        B = torch.randn(site.out_features, rank, generator=noise, dtype=torch.float64)
        result[name] = Factors(A, B, scale)
    return result


def saved(folder: Path, adapter: Adapter) -> Path:
    factors = {name: (f.A.numpy(), f.B.numpy()) for name, f in adapter.items()}
    first = next(iter(adapter.values()))
    return write(folder, factors, first.scale * first.rank)


class Both:
    """Three clients' adapters as updates of a run and as directories."""

    def __init__(self, name: str, root: Path, ranks: Sequence[int], scaling: Any, **options: Any):
        self.root, self.name = root, name
        kind = method_class(name)
        setting = Setting(SITES, max(ranks), ALPHA, 3, 3, scaling)
        self.method: Any = kind(kind.Options(**options), setting)
        self.adapters = [draw(n, rank, setting.scale(rank)) for n, rank in enumerate(ranks)]
        self.clients = [ClientInfo(f"c{n}", rank, EXAMPLES[n]) for n, rank in enumerate(ranks)]
        self.folders = [saved(root / f"c{n}", each) for n, each in enumerate(self.adapters)]

    def update(self, n: int, **content: Any) -> Update:
        return Update(f"c{n}", EXAMPLES[n], content or {"adapter": self.adapters[n]})

    def offline(self, **more: Any) -> Path:
        weights = ",".join(map(str, EXAMPLES))
        out = self.root / "out"
        aggregate(self.name, self.folders, out, **{"weights": weights, **more})
        return out


def near(found: Array, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), wanted.double(), rtol=1e-12, atol=1e-12)


CASES: dict[str, tuple[str, list[int], str, dict[str, Any], list[str]]] = {
    "fedit": ("fedit", [3, 3, 3], "global", {}, []),
    "flora": ("flora", [2, 4, 3], "global", {}, []),
    "fedex-lora": ("fedex-lora", [3, 3, 3], "global", {}, []),
    "lora-fair": ("lora-fair", [3, 3, 3], "global", {"lam": 0.001}, ["lam=0.001"]),
    "fedrot-lora": ("fedrot-lora", [3, 3, 3], "global", {}, []),
    "hetlora": ("hetlora", [2, 4, 3], "global", {}, []),
    "hetlora reduced": (
        "hetlora",
        [2, 4, 3],
        "global",
        {"variant": "reduced"},
        ["variant=reduced"],
    ),
    "hetlora rescaled": ("hetlora", [2, 4, 3], "client", {"rescale": "B"}, ["rescale=B"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_global_adapter(case: str, tmp_path: Path) -> None:
    name, ranks, scaling, options, keys = CASES[case]
    both = Both(name, tmp_path, ranks, scaling, **options)
    state = both.method.begin(both.clients)
    state = aggregated(both.method, state, 1, [both.update(n) for n in range(3)])
    wanted = as_one_adapter(both.method.global_assembly(state), SITES)
    found = dense(both.offline(options=keys) / "_global")
    for site in SITES:
        near(found[site], wanted[site].product())


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
@pytest.mark.parametrize("scaling", ["global", "client"])
def test_each_clients_own(name: str, scaling: str, tmp_path: Path) -> None:
    both = Both(name, tmp_path, [2, 4, 3], scaling)
    state = map_tensors(both.method.begin(both.clients), Tensor.double)
    state = aggregated(both.method, state, 1, [both.update(n) for n in range(3)])
    out = both.offline()
    for client in both.clients:
        offer = offered(both.method, state, 2, client)
        wanted = as_one_adapter(both.method.personal(client, offer, {}), SITES)
        found = dense(out / client.name)
        for site in SITES:
            near(found[site], wanted[site].product())


@pytest.mark.parametrize(("name", "half"), [("fedsa-lora", "A"), ("fedvlm", "B")])
def test_a_shared_half(name: str, half: str, tmp_path: Path) -> None:
    both = Both(name, tmp_path, [3, 3, 3], "global")
    updates = []
    for n, adapter in enumerate(both.adapters):
        updates.append(both.update(n, half={site: getattr(f, half) for site, f in adapter.items()}))
    state = aggregated(both.method, both.method.begin(both.clients), 1, updates)
    out = both.offline()
    for n, adapter in enumerate(both.adapters):
        found = dense(out / f"c{n}")
        for site, f in adapter.items():
            common = state.half[site]
            product = f.B @ common if half == "A" else common @ f.A
            near(found[site], f.scale * product)


def test_a_rotation_in_the_second_round(tmp_path: Path) -> None:
    both = Both("fedrot-lora", tmp_path, [3, 3, 3], "global", at="server")
    previous = draw(50, 3, ALPHA / 3)
    updates = [both.update(n) for n in range(3)]
    state = aggregated(both.method, Whole(previous), 2, updates)
    last = saved(tmp_path / "previous", previous)
    found = dense(both.offline(previous=last, options=["round=2"]) / "_global")
    for site in SITES:
        near(found[site], state.whole[site].product())
