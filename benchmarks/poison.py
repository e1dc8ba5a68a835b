"""What a defence is worth: methods x attacks x rules on the default job with a shared head.

    python benchmarks/poison.py                 writes benchmarks/results/poison.json and poison.md
    python benchmarks/poison.py --plan          what is missing, and how long it takes
    python benchmarks/poison.py --methods fedit --seeds 0,1

A fifth of the clients attack. Each run is kept as a line of the JSON file, so that the study goes on
where it stopped. Told are the honest clients' mean accuracy and, where rows tell, the share of them
that is answered as the attackers wanted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedgrove import __version__
from fedgrove.ground.errors import JobError
from fedgrove.ground.files import write_text
from fedgrove.job import Job
from fedgrove.start import run

RESULTS = Path(__file__).parent / "results"
METHODS = ("fedit", "fed-plora", "fedtreelora", "hilora")
ATTACKS: dict[str, list[str]] = {
    "none": [],
    "label-flip": ["attack.kind=label-flip"],
    "scale": ["attack.kind=scale", "attack.strength=10.0"],
    "sign-flip": ["attack.kind=sign-flip", "attack.strength=3.0"],
    "backdoor": ["attack.kind=backdoor"],
    "adaptive": ["attack.kind=adaptive"],
}
DEFENCES: dict[str, list[str]] = {
    "none": [],
    "norm": ["defence.norm=median"],
    "median": ["defence.rule=median", "defence.attackers=0.25"],
    "multi-krum": ["defence.rule=multi-krum", "defence.attackers=0.25"],
    "geometric-median": ["defence.rule=geometric-median", "defence.attackers=0.25"],
    "foolsgold": ["defence.rule=foolsgold"],
}
COMMON = ["federation.head=shared", "run.rounds=8", "train.threads=1"]
GUESS = 25.0  # seconds of a run


def wanted(methods: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        for method in methods:
            for attack in ATTACKS:
                for defence in DEFENCES:
                    yield {"method": method, "attack": attack, "defence": defence, "seed": seed}


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """A run's figures; a sentence where the rule does not fit the method."""
    settings = [
        f"method.name={row['method']}",
        f"run.seed={row['seed']}",
        *COMMON,
        *ATTACKS[row["attack"]],
        *DEFENCES[row["defence"]],
    ]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = run(Job.default().override(settings), Path(folder) / "run").summary
        except JobError as refused:
            return {**row, "refused": str(refused)}
    attack = summary.get("attack", {})
    everyone = [client["metric"] for client in summary["clients"].values()]
    return {
        **row,
        "honest": attack.get("honest", statistics.mean(everyone)),
        "success": attack.get("success"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "attack", "defence", "seed"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Honest accuracy (and the attack's success) by method and attack, a column for each defence."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "**Honest clients' mean accuracy in %, a fifth of the clients attacking; in brackets the share "
        "of telling rows that are answered as the attackers wanted**",
        "",
        "| method | attack | " + " | ".join(DEFENCES) + " |",
        "|:--|:--|" + "--:|" * len(DEFENCES),
    ]
    for method in METHODS:
        for attack in ATTACKS:
            cells = [cell(rows, method, attack, defence) for defence in DEFENCES]
            if any(cells):
                lines.append(f"| {method} | {attack} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Default job with a shared head, 8 rounds, seeds {', '.join(map(str, seeds))}; the mean over "
        f"seeds. {platform.machine()}, torch {torch.__version__}, fedgrove {__version__}. "
        "“–”: the rule does not fit the method.",
    ]
    return "\n".join(lines) + "\n"


def cell(rows: Sequence[dict[str, Any]], method: str, attack: str, defence: str) -> str:
    own = [
        row
        for row in rows
        if (row["method"], row["attack"], row["defence"]) == (method, attack, defence)
    ]
    if not own:
        return ""
    if "refused" in own[0]:
        return "–"
    text = f"{100 * statistics.mean(row['honest'] for row in own):.1f}"
    told = [row["success"] for row in own if row["success"] is not None]
    if told:
        text += f" ({100 * statistics.mean(told):.0f})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma apart")
    parser.add_argument("--seeds", default="0", help="comma apart")
    parser.add_argument("--minutes", type=float, help="start no run later than this")
    parser.add_argument("--plan", action="store_true", help="say what is missing, and stop")
    given = parser.parse_args()
    file = RESULTS / "poison.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    have = {key(row) for row in rows}
    seeds = [int(seed) for seed in given.seeds.split(",")]
    missing = [row for row in wanted(given.methods.split(","), seeds) if key(row) not in have]
    print(
        f"{len(have)} runs there, {len(missing)} to make, about {len(missing) * GUESS / 60:.0f} min"
    )
    if given.plan:
        return
    started = time.monotonic()
    for number, row in enumerate(missing, start=1):
        if given.minutes and time.monotonic() - started > 60 * given.minutes:
            break
        rows.append(measure(row))
        print(f"[{number}/{len(missing)}] {rows[-1]}", flush=True)
        write_text(file, json.dumps(rows, indent=1) + "\n")
    write_text(RESULTS / "poison.md", table(rows))


if __name__ == "__main__":
    main()
