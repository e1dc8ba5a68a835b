"""Memory with 1,000 registered clients on MiniLM: resident set size after each stage, read from the
kernel.

    python benchmarks/clients.py [--clients 1000] [--examples 100] [--json]

Every client has its own texts (random words, 10 to 60 of them) and, after its first turn, its own
adapter and head (method ``local``, rank 8): the most that a client can cost. Each client takes one
short turn, a cohort at a time. Wanted for 1,000: < 1.5 GB resident.

    python benchmarks/clients.py --rounds 1000 10000 [--out benchmarks/results/clients.json]

What a round costs by the number of registered clients: a random BERT of 2 x 32, 10 texts a client,
FedIT at rank 4, 50 clients a round, 50 measured (``run.evaluate``). Start, the first round and the
mean of four more, each in a process of its own; the final export is not part of it. Wanted: a round at
100,000 at most 1.15 x one at 1,000; resident < 2 GB at 10,000.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = [
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
ROUNDS = 5
A_ROUND = 50  # clients that train, and clients that are measured


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
    parser.add_argument("--rounds", type=int, nargs="+", help="registered clients, several numbers")
    parser.add_argument("--out", type=Path, help="write the rounds' figures as JSON")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(rounds(given.one)))
        return
    if given.rounds:
        compared(given.rounds, given.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), given.clients, given.examples, most=60)
        found = measured(folder, given.clients)
    found |= {"clients": given.clients, "examples": given.examples}
    print(
        json.dumps(found, indent=1)
        if given.json
        else "\n".join(f"{k:28}{v:10.0f}" for k, v in found.items())
    )


def write(folder: Path, clients: int, examples: int, most: int) -> None:
    """A file of random texts, 10 to ``most`` words each, for each client."""
    draw = random.Random(0)
    for number in range(clients):
        rows = [
            {
                "text": " ".join(draw.choices(WORDS, k=draw.randint(10, most))),
                "label": draw.choice(["no", "yes"]),
            }
            for _ in range(examples)
        ]
        lines = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / f"client-{number:06d}.jsonl").write_text(lines, encoding="utf-8")


def compared(sizes: list[int], out: Path | None) -> None:
    """The rounds of each size in a process of its own."""
    from fedgrove.ground.versions import versions

    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    found: dict[str, Any] = {
        "processor": next((r.split(":")[1].strip() for r in cpu if "model name" in r), "?"),
        "versions": versions(),
        "sizes": [],
    }
    for size in sizes:
        command = [sys.executable, __file__, "--one", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        found["sizes"].append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def rounds(clients: int) -> dict[str, float]:
    """Processor seconds of this process (all threads), wall seconds, and memory."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.tiny import save_bert, tiny_job

    from fedgrove.engines.local import prepare
    from fedgrove.runs.loop import Loop
    from fedgrove.runs.records import Records
    from fedgrove.tracking.callback import Callback

    found: dict[str, float] = {"clients": clients, "libraries_mb": resident()}
    with tempfile.TemporaryDirectory() as folder:
        data, model = Path(folder) / "data", Path(folder) / "model"
        data.mkdir()
        write(data, clients, 10, most=20)
        job = tiny_job(
            save_bert(model),
            data,
            federation={"fraction": A_ROUND / clients, "head": "shared"},
            run={"rounds": ROUNDS, "evaluate": A_ROUND},
        )
        started, wall = time.process_time(), time.perf_counter()
        stage = prepare(job)
        out = Path(folder) / "run"
        out.mkdir()
        loop = Loop(stage, Records.at(out, Callback()))
        found |= {
            "start_cpu_s": time.process_time() - started,
            "start_wall_s": time.perf_counter() - wall,
            "started_mb": resident(),
        }
        each = []
        for number in range(1, ROUNDS + 1):
            started, wall = time.process_time(), time.perf_counter()
            loop.round(number)
            each.append((time.process_time() - started, time.perf_counter() - wall))
        later = each[1:]
        found |= {
            "first_round_cpu_s": each[0][0],
            "round_cpu_s": sum(cpu for cpu, _ in later) / len(later),
            "round_wall_s": sum(wall for _, wall in later) / len(later),
            "rounds_mb": resident(),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        }
    return found


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
