"""What a run would leave of its method and its defence if it ended now, out of its newest
checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.adapters.adapter import Factors, Site, Sites
from fedgrove.adapters.tree import Tree, typed, walk
from fedgrove.ground.plain import Plain
from fedgrove.interop.targets import layer_numbers
from fedgrove.methods.contract import Setting
from fedgrove.methods.protocols import ServerArtefacts
from fedgrove.methods.registry import method_class
from fedgrove.tracking.checkpoint import Checkpoints

if TYPE_CHECKING:
    from fedgrove.job import Job


def forming(folder: Path, job: Job) -> Plain:
    """Plain data by file name ("tree.json", "clusters.json", "defence.json", ...); {} before the
    first checkpoint.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    if not checkpoints.exists():
        return {}
    server = checkpoints.load_server()
    found = _of_method(server["state"], job)
    if "defence" in server:
        wanted = {"rule": job.defence.rule, "norm": job.defence.norm}
        found["defence.json"] = {"defence": wanted, "lines": server["defence"]["lines"]}
    return found


def _of_method(state: Tree, job: Job) -> Plain:
    kind = method_class(job.method.name)
    setting = Setting(
        sites=sites_of(state),
        rank=job.lora.rank or 1,
        alpha=float(job.lora.alpha or 0),
        rounds=job.run.rounds,
        seed=job.run.seed,
        scaling=job.lora.scaling,
        rslora=job.lora.rslora,
    )
    method = kind(job.method.options, setting)
    if not isinstance(method, ServerArtefacts):
        return {}
    return dict(method.artefacts(typed(kind.State, state)))


def sites_of(state: Tree) -> Sites:
    """The adapted layers, as the factors ``A [rank, in]``, ``B [out, rank]`` in a state name them."""
    factors: dict[str, Factors] = {}
    for keys, leaf in walk(state):
        if isinstance(leaf, Factors):
            factors[str(keys[-1])] = leaf
    found: dict[str, Site] = {}
    for name, layer in layer_numbers(factors).items():
        leaf = factors[name]
        found[name] = Site(name, layer or 0, leaf.A.shape[1], leaf.B.shape[0])
    return found
