"""``fedgrove demo``: the embedded job beside local training, ending in a table and the report to
open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedgrove.ground.statistics import mean, tail10
from fedgrove.job import Job
from fedgrove.methods.registry import method_class
from fedgrove.start import run
from fedgrove.tracking.live import progress

#: As accurate as FedIT in the mean on this job, better for the weakest clients, and with a quarter
#: less traffic (benchmarks/results/systems-default.md).
FLAGSHIP = "hilora"


def demo(out: Path) -> None:
    """Run the default job with the flagship, and its local twin, under ``out``; what is there is
    resumed or kept.
    """
    console = Console(highlight=False)
    job = Job.default().override([f"method.name={FLAGSHIP}"])
    console.print(f"[1/2] every client alone: {out / 'local'}")
    local = run(
        job.override(["method.name=local"]), out / "local", resume=True, callbacks=[progress()]
    )
    console.print(
        f"[2/2] together, with {method_class(job.method.name).title}: {out / job.method.name}"
    )
    together = run(
        job, out / job.method.name, resume=True, callbacks=[progress()], baselines=[out / "local"]
    )
    console.print(comparison(local.summary, together.summary, method_class(job.method.name).title))
    console.print(f"Adapters, one for each client: {together.path / 'adapters'}", soft_wrap=True)
    console.print(f"Open the report: {together.report}", soft_wrap=True)


def comparison(local: dict[str, Any], together: dict[str, Any], title: str) -> Table:
    """Base, local and federated accuracy over the clients' own test data."""
    table = Table(
        title="Accuracy on each client's own test data",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("", "mean", "tail (10th percentile)", "worst client"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = {
        "base (frozen, head alone)": [
            client["metric_base"] for client in together["clients"].values()
        ],
        "local (each client alone)": [client["metric"] for client in local["clients"].values()],
        f"federated ({title})": [client["metric"] for client in together["clients"].values()],
    }
    for name, values in rows.items():
        table.add_row(name, f"{mean(values):.3f}", f"{tail10(values):.3f}", f"{min(values):.3f}")
    return table
