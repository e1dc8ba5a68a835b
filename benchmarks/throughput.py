"""Fedgrove against the usual ways of doing the same work: same clients, data order, steps, first
adapter and heads.

    python benchmarks/throughput.py                 the embedded classification job, 16 clients x 5 rounds
    python benchmarks/throughput.py --task generate the embedded language model
    python benchmarks/throughput.py --quick         2 rounds, 6 clients, once: does everything still work?

Who (each is a process of its own; all of them one after the other, then again, ``--repeats``
times):

    floor, floor-bf16  one plain PEFT loop over the same tokens: no clients, best batch size of 8 to 64
    swap               (a) PEFT + FedAvg in one process, one resident base, the adapter swapped from client to client
    flower, flower-2   (b) a Flower simulation (Ray): one actor with all cores; one actor for each core
    reload             (c) as (a), with the base loaded anew for each client's turn
    fedgrove           `fedgrove run` as the user gets it (automatic precision)
    fedgrove-fp32      `fedgrove run` with train.dtype = "float32", the opponents' precision

Tokens are real ones (no padding). ``train`` and ``evaluate`` are the seconds of those parts of the
rounds, ``wall`` is the whole process with start-up, and for Fedgrove also the base's measures,
adapters and the report, which the others do not make. Memory is the processes' proportional set
size, watched from outside. Needs ``peft``, and for (b)
``flwr[simulation]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "opponents"))

import plan as plans  # noqa: E402

from fedgrove.ground.versions import versions  # noqa: E402
from fedgrove.job import Job  # noqa: E402
from watch import watch  # noqa: E402

WHO = ("floor", "floor-bf16", "fedgrove", "fedgrove-fp32", "swap", "flower", "flower-2", "reload")
# fmt: off
JOBS: dict[str, list[str]] = {
    "classify": ["method.name=fedit", "run.rounds=5"],
    "generate": [
        "method.name=fedit", "run.rounds=3", "model.name=minimind2-small", "data.name=natural-instructions",
        "data.partition.by=natural", "data.group=task", "federation.clients=8", "data.max_length=192",
        'data.groups=["033_*", "034_*", "035_*", "037_*", "038_*", "040_*", "041_*", "046_*"]',
        # the opponents write no texts
        "data.train_examples=100", "data.test_examples=20", "data.generate_examples=1", "data.max_new_tokens=1",
    ],
}
# fmt: on


def main() -> None:
    given = arguments()
    settings = [*JOBS[given.task], *given.settings]
    if given.quick:
        settings += [
            "run.rounds=2",
            "federation.clients=6",
            "train.local_steps=3",
            "data.test_examples=20",
        ]
    job = Job.default().override(settings)
    work = Path(tempfile.mkdtemp(prefix="throughput-"))
    try:
        plan = plans.write(job, work / "plan")
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in given.who}
        for repeat in range(given.repeats):
            for name in given.who:
                if repeat and name in given.once:
                    continue
                print(
                    f"[{repeat + 1}/{given.repeats}] {name} ...",
                    end=" ",
                    flush=True,
                    file=sys.stderr,
                )
                rows[name].append(one(name, plan, settings, work))
                print(f"{rows[name][-1]['wall']:.1f} s", file=sys.stderr)
        found = {
            "task": given.task,
            "settings": settings,
            "machine": machine(),
            "tokens": dict(
                zip(("train_a_round", "evaluate_a_round"), plans.tokens(plan), strict=True)
            ),
            "rounds": plan["rounds"],
            "clients": len(plan["clients"]),
            "runs": rows,
        }
        found["table"] = {name: measure(found, name) for name in given.who}
        found["ratios"] = ratios(found["table"])
        print(json.dumps(found, indent=1) if given.json else text(found))
        if given.out:
            given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(text(found) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=sorted(JOBS), default="classify")
    parser.add_argument("--who", default=",".join(WHO), help="a part of the list above")
    parser.add_argument(
        "--once", default="reload,flower-2", help="measured in the first repeat only"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], help="a key of the job, for everyone"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--out",
        type=Path,
        help="write NAME.json and NAME.md, for example benchmarks/results/throughput",
    )
    given = parser.parse_args()
    given.who, given.once = [n.strip() for n in given.who.split(",")], given.once.split(",")
    unknown = set(given.who) - set(WHO)
    if unknown:
        parser.error(f"--who: {', '.join(sorted(unknown))}; there are {', '.join(WHO)}")
    if given.quick:
        given.repeats = 1
    return given


def one(name: str, plan: dict[str, Any], settings: list[str], work: Path) -> dict[str, Any]:
    """One process from start to end."""
    cores = len(os.sched_getaffinity(0))
    out, log = work / "out.json", work / "log"
    out.unlink(missing_ok=True)
    environment = {
        "OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_HOME": str(work / "flwr"),
    }  # fmt: skip
    python, loops = sys.executable, str(HERE / "opponents" / "peft_loops.py")
    run = work / "run"
    commands = {
        "floor": [python, loops, "floor", str(work / "plan"), str(out)],
        "floor-bf16": [python, loops, "floor", str(work / "plan"), str(out), "bfloat16"],
        "swap": [python, loops, "swap", str(work / "plan"), str(out)],
        "reload": [python, loops, "reload", str(work / "plan"), str(out)],
        "flower": [
            python,
            str(HERE / "opponents" / "flower_app.py"),
            str(work / "plan"),
            str(out),
            str(cores),
        ],
        "flower-2": [
            python,
            str(HERE / "opponents" / "flower_app.py"),
            str(work / "plan"),
            str(out),
            "1",
        ],
    }
    if name == "flower-2":
        environment["OMP_NUM_THREADS"] = "1"
    if name.startswith("fedgrove"):
        shutil.rmtree(run, ignore_errors=True)
        chosen = [*settings, "train.dtype=float32"] if name == "fedgrove-fp32" else settings
        options = [part for setting in chosen for part in ("--set", setting)]
        commands[name] = [python, "-m", "fedgrove", "run", *options, "--profile", "--out", str(run)]
        environment.pop("OMP_NUM_THREADS")  # fedgrove chooses
    watched = watch(commands[name], environment, log)
    if watched.code:
        raise SystemExit(f"{name} failed:\n{watched.tail}")
    row = {"wall": watched.seconds, "peak_mb": watched.peak_mb}
    return row | (of_run(run, plan) if name.startswith("fedgrove") else json.loads(out.read_text()))


def of_run(run: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The same figures from a Fedgrove run's own files."""
    profile, summary = (
        json.loads((run / "profile.json").read_text()),
        json.loads((run / "summary.json").read_text()),
    )
    last = [row["metric"] for row in summary["clients"].values() if not row.get("held_out")]
    return {
        "rounds": [
            {
                "train": row["seconds"]["training"] + row["seconds"]["server"],
                "evaluate": row["seconds"]["evaluation"],
            }
            for row in profile["rounds"]
        ],
        "profile": profile["seconds"],
        "accuracy": sum(last) / len(last) if plan["kind"] == "classify" else None,
        "inside": summary["seconds"]["total"],
    }


def measure(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Means over repeats and rounds, and every repeat's values for the spread."""
    runs, tokens = found["runs"][name], found["tokens"]
    train = [statistics.mean(r["train"] for r in run["rounds"]) for run in runs]
    both = [statistics.mean(r["train"] + r["evaluate"] for r in run["rounds"]) for run in runs]
    return {
        "wall": [run["wall"] for run in runs],
        "train_seconds": train,
        "round_seconds": both,
        "train_tokens_per_second": tokens["train_a_round"] / statistics.median(train),
        "startup_and_rest": [
            run["wall"] - sum(r["train"] + r["evaluate"] for r in run["rounds"]) for run in runs
        ],
        "peak_mb": max(run["peak_mb"] for run in runs),
        "accuracy": [run["accuracy"] for run in runs if run["accuracy"] is not None],
        **{key: runs[0][key] for key in ("batch_size",) if key in runs[0]},
    }


def ratios(table: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked: (what, ratio of medians, smallest and largest over pairs of one repeat)."""
    wanted = [
        ("whole job: Flower / fedgrove", "flower", "fedgrove", "wall", "≥ 4"),
        (
            "whole job: Flower, an actor for each core / fedgrove",
            "flower-2",
            "fedgrove",
            "wall",
            "≥ 4",
        ),
        ("whole job: swap / fedgrove", "swap", "fedgrove", "wall", "≥ 2"),
        ("whole job: swap / fedgrove-fp32", "swap", "fedgrove-fp32", "wall", "≥ 1.1"),
        ("rounds: swap / fedgrove", "swap", "fedgrove", "round_seconds", ""),
        ("rounds: swap / fedgrove-fp32", "swap", "fedgrove-fp32", "round_seconds", ""),
        ("whole job: reload / fedgrove", "reload", "fedgrove", "wall", ""),
        ("training: fedgrove-fp32 / floor", "fedgrove-fp32", "floor", "train_seconds", "≤ 1.15"),
        ("training: fedgrove / floor-bf16", "fedgrove", "floor-bf16", "train_seconds", "≤ 1.15"),
    ]
    rows = []
    for what, above, below, key, target in wanted:
        if table.get(above, {}).get(key) and table.get(below, {}).get(key):
            a, b = table[above][key], table[below][key]
            pairs = [x / y for x, y in zip(a, b, strict=False)]
            ratio = statistics.median(a) / statistics.median(b)
            rows.append(
                {
                    "what": what,
                    "ratio": ratio,
                    "low": min(pairs),
                    "high": max(pairs),
                    "wanted": target,
                }
            )
    return rows


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    load = os.getloadavg()[0]
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_at_end": round(
            load, 2
        ),  # above the cores: others were working, and the ratios are worth less
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def text(found: dict[str, Any]) -> str:
    tokens, info = found["tokens"], found["machine"]
    lines = [
        f"# Throughput: {found['task']}, {found['clients']} clients x {found['rounds']} rounds",
        "",
        f"{tokens['train_a_round']} tokens trained and {tokens['evaluate_a_round']} evaluated a "
        f"round (no padding). "
        f"{info['processor']}, {info['cores']} cores, load {info['load_at_end']}, {info['date']}; "
        + ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
        "",
        "| who | wall s | train tokens/s | train s a round | evaluate s a round | other s | peak "
        "MB | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["table"].items():
        train, both = (
            statistics.median(row["train_seconds"]),
            statistics.median(row["round_seconds"]),
        )
        accuracy = f"{statistics.mean(row['accuracy']):.3f}" if row["accuracy"] else "-"
        label = f"{name} (batch {row['batch_size']})" if "batch_size" in row else name
        lines.append(
            f"| {label} | {spread(row['wall'])} | {row['train_tokens_per_second']:.0f} | "
            f"{train:.2f} | "
            f"{both - train:.2f} | {statistics.median(row['startup_and_rest']):.1f} | "
            f"{row['peak_mb']:.0f} | "
            f"{accuracy} |"
        )
    lines += ["", "| ratio | | lowest to highest of a repeat | wanted |", "|---|---|---|---|"]
    for row in found["ratios"]:
        lines.append(
            f"| {row['what']} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} | "
            f"{row['wanted']} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
