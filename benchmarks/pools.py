"""Does routing pay? Pools of adapters that were trained apart, on clients that differ in task and on
clients that are alike, beside each owner's own adapter, the base, all members alike, the best single
member and FedIT's global model.

    python benchmarks/pools.py                              both fields, seeds 0 to 4, every router
    python benchmarks/pools.py --plan                       what is missing and how long it takes
    python benchmarks/pools.py --fields tasks --seeds 0,1
    python benchmarks/pools.py --pages                      the tables from what there is
    python benchmarks/pools.py --speed                      a batch whose members run for their rows, and for all

* ``tasks``: 12 Natural Instructions tasks, a client each, MiniMind2-Small. A prompt tells its task, so
  that routing should pay; masked, another task must answer.
* ``alike``: 16 clients of four domains of sentiment with the same labels, MiniLM: they do one thing,
  so that all members alike should do as well.
* ``skewed``: the same with Dirichlet(0.5) labels: a router sees the domain, not the skew that the
  heads carry.

Members train alone (``local``). Every run and every measurement is kept in ``benchmarks/results/pools``
under all that it depends on, so the study goes on where it stopped. One thread; start it with ``nice``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pools"
ROUTERS = ("retrieve", "retrieve-1", "arrow", "roc", "uniform")
RIVALS = ("own", "base", "best")
_VERSION = 1  # changes with what is measured


@dataclass(frozen=True)
class Field:
    """A job whose clients train alone.

    ``guess``: CPU seconds of a run, and of a router's measurement, on one thread.
    """

    name: str
    about: str
    metric: str
    settings: tuple[str, ...]
    file: str | None = None  # in jobs/
    guess: tuple[float, float] = (200.0, 60.0)


_SENTIMENT = (
    "model.name=minilm",
    "data.name=sentiment",
    "data.group=domain",
    "data.train_examples=60",
    "federation.clients=16",
    "federation.head=local",
)
FIELDS = {
    "tasks": Field(
        "tasks",
        "12 tasks of Natural Instructions, a client each",
        "loss",
        (
            "federation.clients=12",
            'data.groups=["02[45]_*", "03[34789]_*", "04[0126]_*", "050_*"]',
        ),
        file="evidence-generation-small.toml",
        guess=(900.0, 240.0),
    ),
    "alike": Field(
        "alike",
        "sentiment of four domains, labels alike",
        "accuracy",
        (*_SENTIMENT, "data.partition.by=iid"),
    ),
    "skewed": Field(
        "skewed",
        "sentiment of four domains, labels by Dirichlet(0.5)",
        "accuracy",
        (*_SENTIMENT, "data.partition.by=dirichlet", "data.partition.options.alpha=0.5"),
    ),
}


@dataclass(frozen=True)
class Piece:
    """One thing to compute: a run of a method, or what a router makes of the members."""

    field: Field
    seed: int
    what: str  # "run:local", "run:fedit", or "pool:ROUTER"

    @property
    def key(self) -> str:
        told = [_VERSION, self.field.settings, self.field.file, self.seed, self.what]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    @property
    def file(self) -> Path:
        kind = self.what.replace(":", "-")
        return RESULTS / f"{self.field.name}-{self.seed}-{kind}-{self.key}.json"

    @property
    def seconds(self) -> float:
        if self.what.startswith("run:"):
            return self.field.guess[0]
        return self.field.guess[1]


def main() -> None:
    given = _arguments()
    if given.speed:
        speed()
        return
    wanted = list(pieces(given.fields.split(","), _seeds(given.seeds)))
    if not given.pages:
        missing = [each for each in wanted if not each.file.exists()]
        hours = sum(each.seconds for each in missing) / 3600
        print(f"{len(missing)} of {len(wanted)} pieces are missing, about {hours:.1f} CPU hours.")
        if given.plan:
            for each in missing:
                print(f"  {each.field.name}, seed {each.seed}: {each.what}")
            return
        work(missing, given.runs)
    page(wanted)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fields", default=",".join(FIELDS), help="comma-separated")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--runs", type=Path, default=Path("runs/pools"), help="where runs are kept")
    parser.add_argument("--plan", action="store_true", help="say what is missing, and stop")
    parser.add_argument("--speed", action="store_true", help="time one batch, on random weights")
    parser.add_argument("--pages", action="store_true", help="the tables alone")
    given = parser.parse_args()
    for name in given.fields.split(","):
        if name not in FIELDS:
            parser.error(f"--fields {name}: choose from {', '.join(FIELDS)}")
    return given


def _seeds(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def pieces(fields: Sequence[str], seeds: Sequence[int]) -> Iterator[Piece]:
    """In the order in which they need each other."""
    for name in fields:
        for seed in seeds:
            for what in ("run:local", "run:fedit", *(f"pool:{router}" for router in ROUTERS)):
                yield Piece(FIELDS[name], seed, what)


# ------------------------------------------------------------------------- work
def work(missing: Sequence[Piece], runs: Path) -> None:
    """Each piece that is missing, one after the other."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(missing, start=1):
        began = time.process_time()
        kind, _, name = each.what.partition(":")
        if kind == "run":
            found = run_of(each, name, runs)
        else:
            found = pool_of(each, name, runs)
        found["seconds"] = time.process_time() - began
        partial = each.file.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, each.file)
        print(
            f"{number}/{len(missing)} {each.field.name}, seed {each.seed}: {each.what}", flush=True
        )


def folder_of(piece: Piece, method: str, runs: Path) -> Path:
    """Where a run of this piece's field and seed lies."""
    return runs / f"{piece.field.name}-{piece.seed}-{method}"


def job_of(piece: Piece, method: str) -> Any:
    from fedgrove.job import Job

    if piece.field.file is None:
        job = Job.default()
    else:
        job = Job.load(HERE.parent / "jobs" / piece.field.file)
    return job.override([*piece.field.settings, f"method.name={method}", f"run.seed={piece.seed}"])


def run_of(piece: Piece, method: str, runs: Path) -> dict[str, Any]:
    """Train, and each client's measure."""
    import fedgrove as fg

    folder = folder_of(piece, method, runs)
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        fg.run(job_of(piece, method), folder)
    clients = fg.Result(folder).summary["clients"]
    kept = {name: row for name, row in clients.items() if not row.get("held_out")}
    column = {"accuracy": "metric", "loss": "loss"}[piece.field.metric]
    return {"measures": {method: {name: row[column] for name, row in kept.items()}}}


def pool_of(piece: Piece, router: str, runs: Path) -> dict[str, Any]:
    """The members' pool by this router, with the owner visible and masked."""
    import fedgrove as fg
    from fedgrove.pools.against import against, owners_rows

    name, _, few = router.partition("-")
    kinds: dict[str, Any] = {"retrieve": "mean", "roc": "gaussian"}
    options: dict[str, Any] = {"router": name, "signature": kinds.get(name)}
    if few:
        options["top_k"] = int(few)
    run = folder_of(piece, "local", runs)
    if not (run / "summary.json").exists():
        run_of(piece, "local", runs)
    pool = fg.pool([run], **options)
    rivals = list(RIVALS) if router == ROUTERS[0] else []
    found = against(pool, owners_rows(pool), rivals, mask_own=True)
    metric = piece.field.metric
    measures = {
        who: {owner: each[metric] for owner, each in rows.items()}
        for who, rows in found.measures.items()
    }
    return {"measures": measures, "shares": found.shares, "best": found.best}


# ------------------------------------------------------------------------- speed
def speed(members: int = 32, rows: int = 16, tokens: int = 32, rank: int = 8) -> None:
    """CPU seconds of a pass over an encoder of MiniLM's size with random weights: the base alone, with
    ``members`` of which each row chooses 1 or 3, and with all of them on all rows.
    """
    import torch

    from fedgrove.adapters.adapter import Factors
    from fedgrove.adapters.assembly import Extra, Mix, Term
    from fedgrove.adapters.routers import ByExample, Choice, Retrieve

    class Everywhere(ByExample):
        """Every member on every row, by weights that are mostly zero."""

        def choose(self, features: Any, extras: Any, examples: int) -> Choice:
            return Retrieve(1).choose(features, extras, examples)

        def spread(self, at: Any, choice: Choice) -> Any:
            return [column[:, None, None] for column in choice.weights.T]

    torch.manual_seed(0)
    base, hooked = _random_base()
    terms = []
    for number in range(members):
        adapter = {
            name: Factors(
                torch.randn(rank, site.in_features), torch.randn(site.out_features, rank), 1.0
            )
            for name, site in base.sites.items()
        }
        terms.append(Term(str(number), adapter, train=""))
    means = torch.randn(members, base.hidden)
    extras = {"signature.mean": Extra(means, train=False)}
    owners = torch.arange(rows) % 8  # eight owners in a batch
    features = means[owners] + 0.1 * torch.randn(rows, base.hidden)
    batch = {
        "input_ids": torch.randint(5, 1000, (rows, tokens)),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
    }
    chosen: dict[str, Mix | None] = {
        "the base alone": None,
        "the members that a row chose, 1 each": Retrieve(1),
        "3 each": Retrieve(3),
        "all members on all rows": Everywhere(),
    }
    for label, mix in chosen.items():
        seconds = _timed(hooked, batch, features, mix, tuple(terms), extras)
        print(f"{label}: {1000 * seconds:.0f} ms")


def _random_base() -> tuple[Any, Any]:
    import torch
    from transformers import BertConfig, BertModel

    from fedgrove.interop.models import Base
    from fedgrove.interop.targets import find_sites
    from fedgrove.training.hooked import HookedBase

    config = BertConfig(
        vocab_size=1000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    model = BertModel(config).eval().requires_grad_(False)
    sites = find_sites(model, ["query", "value"])
    plain = torch.float32, torch.device("cpu")
    base = Base("random", "random", model, None, sites, 384, "pooled", (), {}, *plain)
    return base, HookedBase(base, packs=False)


def _timed(
    hooked: Any, batch: Any, features: Any, mix: Any, terms: Any, extras: Any, times: int = 3
) -> float:
    """The median of ``times`` passes."""
    import torch

    from fedgrove.adapters.assembly import Assembly
    from fedgrove.training.live import LiveAssembly

    found = []
    device = torch.device("cpu")
    live = None
    if mix is not None:
        assembly = Assembly(terms, mix, extras)
        live = LiveAssembly(assembly, device=device, dtype=torch.float32, train=False)
        live.features = features
    with torch.inference_mode():
        for _ in range(times + 1):
            began = time.process_time()
            with hooked.running(batch, live):
                if live is not None:
                    live.begin(len(features), batch["attention_mask"].bool())
                hooked.base.model(**batch)
            found.append(time.process_time() - began)
    return sorted(found[1:])[times // 2]


# ------------------------------------------------------------------------- tables
def page(wanted: Sequence[Piece]) -> None:
    """``pools.md``: a table of each field, means over clients, then over seeds (± standard deviation
    over seeds).
    """
    lines = [
        "# Does routing pay?",
        "",
        "Made by `benchmarks/pools.py` from `benchmarks/results/pools`.",
    ]
    for field in dict.fromkeys(each.field for each in wanted):
        own = [each for each in wanted if each.field == field and each.file.exists()]
        if not own:
            continue
        seeds = len({each.seed for each in own})
        lines += [
            "",
            f"## {field.about}",
            "",
            f"Mean {field.metric} of a client, {seeds} seeds.",
            "",
        ]
        lines += ["| who answers | own member visible | masked |", "|---|---|---|"]
        for label, visible, masked in table(own):
            lines.append(f"| {label} | {visible} | {masked} |")
    target = HERE / "results" / "pools.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Wrote {target}.")


def table(found: Sequence[Piece]) -> Iterator[tuple[str, str, str]]:
    """(who, visible, masked) of each router and rival."""
    visible: dict[str, list[float]] = {}
    masked: dict[str, list[float]] = {}
    for each in found:
        kind, _, name = each.what.partition(":")
        measures = json.loads(each.file.read_text(encoding="utf-8"))["measures"]
        for who, rows in measures.items():
            mean = fmean(rows.values())
            if who == "masked":
                masked.setdefault(name, []).append(mean)
            elif who == "pool":
                visible.setdefault(name, []).append(mean)
            elif kind == "run" and who == "fedit":
                visible.setdefault("FedIT's global", []).append(mean)
            elif who != "local":
                visible.setdefault(who, []).append(mean)
    for who, values in visible.items():
        yield who, _spread(values), _spread(masked.get(who, []))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


if __name__ == "__main__":
    main()
