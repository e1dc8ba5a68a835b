"""The server's arithmetic on one thread: processor time and memory as the number of clients grows.

    python benchmarks/server.py --out benchmarks/results/server     (writes server.json and server.png; minutes)
    python benchmarks/server.py --quick

tree      FedTreeLoRA: distances between B, the merge tree and its cuts; RoBERTa-large shape: 24 layers x query and
          value, d 1024, rank 4. Wanted for 1,000 clients: < 20 s and < 3 GB, the clients' B
          included.
spectral  HiLoRA: bases of B, principal angles, spectral clustering; 24 sites, d 1024, rank 8. Wanted: < 60 s.
Above 2,000 clients both go by landmarks and sketches: the method's own rule, which sees one site of all clients at a
time, and so does the memory here. Agreement: adjusted Rand index with the 8 planted groups. Wanted for 10,000:
          < 120 s, < 4 GB.
mean      HiLoRA's mean of products at d = 4096 (20 clients of rank 16, one site) beside its QR trick alone in float64
          (QR of the stacked factors, SVD of the core, and the products back). Wanted: within 2 x.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = (10, 32, 100, 316, 1000, 3162, 10000)
EXACT = 2000  # as fedgrove.clustering.landmarks
WANTED = {"tree": (20.0, 3000.0), "spectral": (60.0, None)}


def clients_of(count: int, sites: int, d: int, rank: int) -> list[dict[str, Any]]:
    """B of clients in 8 loose groups, by site."""
    import torch

    draw = torch.Generator().manual_seed(0)
    centres = [[torch.randn(d, rank, generator=draw) for _ in range(sites)] for _ in range(8)]
    return [
        {
            f"s{s}": centres[c % 8][s] + 0.7 * torch.randn(d, rank, generator=draw)
            for s in range(sites)
        }
        for c in range(count)
    ]


def one_site(count: int, d: int, rank: int, seed: int) -> list[Any]:
    """B of clients in 8 loose groups at one site."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, d, rank, generator=draw)
    return [centres[c % 8] + 0.7 * torch.randn(d, rank, generator=draw) for c in range(count)]


def agreement(labels: list[int]) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score([c % 8 for c in range(len(labels))], labels))


def tree_by_landmarks(count: int) -> tuple[float, dict[str, Any]]:
    from fedgrove.adapters.adapter import Site
    from fedgrove.methods.fedtreelora import GroupMeans, TreeOptions
    from fedgrove.methods.rule import Round

    sites = {f"s{s}": Site(f"s{s}", s // 2, 1024, 1024) for s in range(48)}
    rule = GroupMeans(TreeOptions(tau=0.0, K=4), Round(sites))
    distances = 0.0
    for seed, site in enumerate(sites.values()):
        clients = one_site(count, 1024, 4, seed)
        started = time.process_time()
        rule.see(site, clients)
        distances += time.process_time() - started
    started = time.process_time()
    grown = rule.grown
    cuts = time.process_time() - started
    deepest = grown.labels[23]
    found = {"distances": distances, "cuts": cuts, "groups": len(set(deepest))}
    return distances + cuts, {**found, "agreement": agreement(deepest)}


def spectral_by_landmarks(count: int) -> tuple[float, dict[str, Any]]:
    from fedgrove.adapters.adapter import Site
    from fedgrove.methods.hilora import ClusterMeans, HiLoRAOptions
    from fedgrove.methods.rule import Round

    sites = {f"s{s}": Site(f"s{s}", s, 1024, 1024) for s in range(24)}
    rule = ClusterMeans(HiLoRAOptions(), Round(sites))
    angles = 0.0
    for seed in range(len(sites)):
        clients = one_site(count, 1024, 8, seed)
        started = time.process_time()
        rule.see(clients)
        angles += time.process_time() - started
    started = time.process_time()
    labels = rule.labels
    clusters = time.process_time() - started
    found = {"angles": angles, "clusters": clusters, "groups": len(set(labels))}
    return angles + clusters, {**found, "agreement": agreement(labels)}


def tree(count: int) -> tuple[float, dict[str, Any]]:
    if count > EXACT:
        return tree_by_landmarks(count)
    from fedgrove.adapters.adapter import Site
    from fedgrove.adapters.distance import between
    from fedgrove.clustering.tree import layer_cuts, merge_tree

    sites = {f"s{s}": Site(f"s{s}", s // 2, 1024, 1024) for s in range(48)}
    clients = clients_of(count, 48, 1024, 4)
    started = time.process_time()
    distances = between(clients, sites, "frobenius").numpy()
    measured = time.process_time()
    cuts = layer_cuts(merge_tree(distances.mean(0)), list(distances), tau=0.0, K=4)
    done = time.process_time()
    return done - started, {
        "distances": measured - started,
        "cuts": done - measured,
        "groups": cuts[-1].count,
    }


def spectral(count: int) -> tuple[float, dict[str, Any]]:
    if count > EXACT:
        return spectral_by_landmarks(count)
    import torch

    from fedgrove.adapters.subspace import basis, principal_angle_distances
    from fedgrove.clustering.spectral import spectral as cluster

    clients = clients_of(count, 24, 1024, 8)
    seconds = dict.fromkeys(("bases", "angles", "clusters"), 0.0)
    total = torch.zeros(count, count, dtype=torch.float64)
    for site in clients[0]:
        started = time.process_time()
        found = [basis(client[site].double()) for client in clients]
        middle = time.process_time()
        total += principal_angle_distances(found) / 24
        seconds["bases"] += middle - started
        seconds["angles"] += time.process_time() - middle
    started = time.process_time()
    k = cluster(total.numpy()).k
    seconds["clusters"] = time.process_time() - started
    return sum(seconds.values()), {**seconds, "groups": k}


def mean(count: int) -> tuple[float, dict[str, Any]]:
    import torch

    from fedgrove.adapters.adapter import Factors
    from fedgrove.adapters.lowrank import product_mean

    draw = torch.Generator().manual_seed(0)
    factors = [
        Factors(torch.randn(16, 4096, generator=draw), torch.randn(4096, 16, generator=draw), 1.0)
        for _ in range(count)
    ]

    def trick() -> None:
        a, b = (
            torch.cat([f.A for f in factors]).double(),
            torch.cat([f.B for f in factors], 1).double(),
        )
        qb, rb = torch.linalg.qr(b)
        qa, ra = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        qb @ u[:, :16], s, vh[:16] @ qa.T

    def ours() -> None:
        product_mean([{"site": f} for f in factors], None, 16, 1.0, "left")

    times: dict[str, list[float]] = {"ours": [], "trick": []}
    for _ in range(5):
        for name, work in (("ours", ours), ("trick", trick)):
            started = time.process_time()
            work()
            times[name].append(time.process_time() - started)
    best = {name: min(values) for name, values in times.items()}
    return best["ours"], {"trick": best["trick"], "ratio": best["ours"] / best["trick"]}


def one(what: str, count: int) -> None:
    import torch

    torch.set_num_threads(1)
    seconds, parts = {"tree": tree, "spectral": spectral, "mean": mean}[what](count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"clients": count, "seconds": seconds, "peak_mb": peak, **parts}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at most 100 clients")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.png")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one[0], int(given.one[1]))
        return
    found: dict[str, Any] = {"machine": _machine()}
    for what in ("mean", "tree", "spectral"):
        sizes = (
            (20,) if what == "mean" else [size for size in SIZES if not given.quick or size <= 100]
        )
        found[what] = []
        for size in sizes:
            command = [sys.executable, __file__, "--one", what, str(size)]
            environment = dict.fromkeys(
                ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
            )
            done = subprocess.run(
                command, env=_environment(environment), capture_output=True, text=True, check=True
            )
            found[what].append(json.loads(done.stdout.splitlines()[-1]))
            row = found[what][-1]
            print(f"{what:9}" + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    if given.out:
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        picture(found, given.out.with_suffix(".png"))


def _environment(more: dict[str, str]) -> dict[str, str]:
    import os

    return {**os.environ, **more}


def _machine() -> dict[str, Any]:
    from fedgrove.ground.versions import versions

    rows = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((r.split(":")[1].strip() for r in rows if "model name" in r), "?"),
        "versions": versions(),
    }


def picture(found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for what, colour in (("tree", "tab:green"), ("spectral", "tab:purple")):
        sizes = [row["clients"] for row in found[what]]
        left.loglog(sizes, [row["seconds"] for row in found[what]], "o-", color=colour, label=what)
        left.axhline(WANTED[what][0], color=colour, linestyle=":", linewidth=1)
        right.loglog(sizes, [row["peak_mb"] for row in found[what]], "o-", color=colour, label=what)
    left.set(xlabel="clients", ylabel="seconds, one thread (dotted: wanted at 1,000)")
    right.set(xlabel="clients", ylabel="peak memory, MB")
    left.legend(frameon=False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
