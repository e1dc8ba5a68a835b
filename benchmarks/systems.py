"""Each of the three systems against FedIT, Local and its own simpler variants: same clients,
splits, budget, tuning.

    python benchmarks/systems.py fedtreelora --seeds 0,1,2 --tune lr=5e-4,1e-3

FedIT + local fine-tuning is in every table (``train.final_local_epochs``). The comparison resumes
where it stopped; its tables go to ``benchmarks/results/systems-NAME.{md,json}`` with the machine
and versions. One run takes a minute or two on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from fedgrove.compare import compare
from fedgrove.ground.versions import versions
from fedgrove.job import Job

HERE = Path(__file__).parent
#: name -> (job; None is the embedded default), methods, changes to the job
STUDIES: dict[str, tuple[str | None, list[str], list[str]]] = {
    "default": (None, ["fedit", "fedtreelora[tau=0.0]", "hilora"], []),
    "fedtreelora": (
        "fedtreelora-nlu-small.toml",
        [
            "fedit",
            "fedtreelora",
            "fedtreelora[fixed_k=4]",
            "fedtreelora[tree=false]",
            "fedtreelora[external=false]",
        ],
        # milder label skew: at Dirichlet 0.5 the private heads alone decide, and every method is
        # the frozen base
        [
            "data.partition.options.alpha=5.0",
            "federation.clients=12",
            "data.train_examples=80",
            "run.rounds=8",
        ],
    ),
    "hilora": (
        "hilora-small.toml",
        ["fedit", "hilora", "hilora[fractions=[1,0,0]]", "hilora[fractions=[0.4,0.6,0]]"],
        [],
    ),
    "fed-plora": (
        "fed-plora-small.toml",
        ["fed-plora", "hetlora", "flexlora", "flora"],
        ["run.noise=false"],
    ),
    # FedIT wants one rank: the smallest budget, which all can pay, and the largest, which most
    # cannot
    "fed-plora-rank-2": (
        "fed-plora-small.toml",
        ["fedit"],
        ["run.noise=false", "federation.ranks=[2]"],
    ),
    "fed-plora-rank-8": (
        "fed-plora-small.toml",
        ["fedit"],
        ["run.noise=false", "federation.ranks=[8]"],
    ),
    # images: clients that differ in classes, in super-classes, and in which ten classes they have
    # at all
    "images-gl": ("hilora-quickdraw-gl-small.toml", ["fedit", "hilora"], ["run.eval_every=10"]),
    "images-sc": ("hilora-quickdraw-sc-small.toml", ["fedit", "hilora"], ["run.eval_every=10"]),
    "images-patho": (
        "hilora-quickdraw-patho-small.toml",
        ["fedit", "hilora"],
        ["run.eval_every=10"],
    ),
    "generation": (
        "fedtreelora-generation-small.toml",
        ["fedit", "fedtreelora"],
        ["run.eval_every=8"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tune", action="append", default=[])
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args()
    file, methods, changes = STUDIES[given.study]
    job = Job.load(HERE.parent / "jobs" / file) if file else Job.default()
    out = given.out / given.study
    found = compare(
        job, methods, given.seeds, out, tune=given.tune, settings=[*changes, *given.settings]
    )
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "arguments": {key: value for key, value in vars(given).items() if key != "out"},
    }
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"systems-{given.study}.json").write_text(
        json.dumps({"machine": machine, **found}, indent=1) + "\n"
    )
    table = (out / "table.md").read_text()
    note = f"Machine: {machine['cores']} cores, {machine['processor']}; {json.dumps(machine['versions'])}\n"
    (results / f"systems-{given.study}.md").write_text(f"{table}\n{note}")


if __name__ == "__main__":
    main()
