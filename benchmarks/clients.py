"""Memory with 1,000 registered clients on MiniLM: resident set size after each stage, read from the
kernel.

    python benchmarks/clients.py [--clients 1000] [--examples 100] [--json]

Every client has its own texts (random words, 10 to 60 of them) and, after its first turn, its own
adapter and head (method ``local``, rank 8): the most that a client can cost. Each client takes one
short turn, a cohort at a time. Wanted for 1,000: < 1.5 GB resident.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
from pathlib import Path


def resident() -> float:
    """Megabytes (10^6 bytes)."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 / 1e6 for row in rows if row.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    draw = random.Random(0)
    words = [
        "the",
        "a",
        "film",
        "was",
        "good",
        "bad",
        "and",
        "very",
        "it",
        "felt",
        "book",
        "day",
        "long",
        "bright",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.clients):
            rows = [
                {
                    "text": " ".join(draw.choices(words, k=draw.randint(10, 60))),
                    "label": draw.choice(["no", "yes"]),
                }
                for _ in range(given.examples)
            ]
            lines = "\n".join(map(json.dumps, rows)) + "\n"
            (Path(folder) / f"client-{number:04d}.jsonl").write_text(lines, encoding="utf-8")
        found = measured(folder, given.clients)
    found |= {"clients": given.clients, "examples": given.examples}
    print(
        json.dumps(found, indent=1)
        if given.json
        else "\n".join(f"{k:28}{v:10.0f}" for k, v in found.items())
    )


def measured(folder: str, clients: int) -> dict[str, float]:
    from fedgrove.engines.local import prepare
    from fedgrove.job import Job

    started = resident()
    job = Job.build(
        {
            "data": {"source": "silos", "path": folder},
            "lora": {"rank": 8},
            "method": {"name": "local"},
            "train": {"local_steps": 1, "batch_size": 2},
        }
    )
    prepared = prepare(job)
    after = {"libraries MB": started, "prepared MB": resident()}
    half = clients // 2
    names = list(prepared.clients)
    for group in (names[:half], names[half:]):
        for _ in prepared.engine.train(1, group, lambda name: {"method": {}}):
            pass
        after[f"trained {len(group)} more MB"[:28] + ("" if group[0] == names[0] else " ")] = (
            resident()
        )
    after["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    after["cohort"] = int(prepared.job.train.cohort)
    return after


if __name__ == "__main__":
    main()
