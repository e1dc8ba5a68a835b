"""The evidence: where each of the three systems' ideas pays, and what composes them. One command
makes all of it.

    python benchmarks/evidence.py                          all fields, seeds 0 to 4, with tuning
    python benchmarks/evidence.py --only generation --seeds 0,1
    python benchmarks/evidence.py --quick                  ten minutes: small twins, two seeds, no tuning
    python benchmarks/evidence.py --plan                   what is missing and how long it takes
    python benchmarks/evidence.py --pages                  tables and pictures from the runs that there are

Every run is kept as a small file in ``benchmarks/results/evidence/runs``, named after all that it
depends on, so the study goes on where it stopped (Ctrl-C is fine, so is another day), and a changed
job is run anew. Each method tries the same learning rates on a seed that is not reported. Runs use
one thread; start it with ``nice`` on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

from study import oracle, pages, pictures
from study.fields import ANCHORS, FIELDS, SYSTEMS, Field
from study.results import TUNING_SEED, FieldResult, Study, judged, plain
from study.trials import Record, Trial, known, made, trial

from fedgrove.compare.entries import parse_seeds
from fedgrove.ground.errors import FedgroveError
from fedgrove.ground.versions import versions
from fedgrove.methods import registry

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "evidence"
RESULTS_PAGE = HERE.parent / "docs" / "results.md"
QUICK_MINUTES = 10.0


def main() -> None:
    given = _arguments()
    for own in oracle.METHODS:
        registry.register(own)
    fields = _fields(given.only, quick=given.quick)
    cache = given.out / "quick" if given.quick else RESULTS / "runs"
    study = Study(cache, tuple(parse_seeds(given.seeds)), given.quick)
    if not given.pages:
        tune = not (given.no_tune or given.quick)
        stages = ([tuning(fields)] if tune else []) + [reported(study, fields, given.methods)]
        announce(stages, study)
        if given.plan:
            return
        limit = QUICK_MINUTES if given.quick else given.minutes
        deadline = None if limit is None else time.monotonic() + 60 * limit
        for number in range(len(stages)):
            # what is reported depends on what the tuning found
            last = number == len(stages) - 1
            stage = reported(study, fields, given.methods) if last else stages[number]
            if not work(stage, study, given.out, deadline):
                break
    folder = given.out / "quick-pages" if given.quick else RESULTS
    write(study, fields, folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="FIELD", help=", ".join(FIELDS)
    )
    parser.add_argument("--methods", default="", help="Only these, as in the tables, comma apart.")
    parser.add_argument(
        "--seeds", default=None, help="Reported seeds; 0,1,2,3,4, or 0,1 with --quick."
    )
    parser.add_argument(
        "--quick", action="store_true", help="Ten minutes, and nothing is committed."
    )
    parser.add_argument("--no-tune", action="store_true", help="The job's learning rate for all.")
    parser.add_argument(
        "--minutes", type=float, help="Start no run that would end later than this."
    )
    parser.add_argument("--plan", action="store_true", help="Say what is missing, and stop.")
    parser.add_argument(
        "--pages", action="store_true", help="Run nothing; write tables and pictures."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="For runs in work.")
    given = parser.parse_args()
    if given.seeds is None:
        given.seeds = "0,1" if given.quick else "0,1,2,3,4"
    return given


def _fields(names: Sequence[str], *, quick: bool) -> list[Field]:
    wanted = [name for text in names for name in text.split(",")]
    for name in wanted:
        if name not in FIELDS:
            sys.exit(f"--only {name}: there is no such field; there are {', '.join(FIELDS)}.")
    chosen = [FIELDS[name] for name in wanted or FIELDS]
    return [field for field in chosen if field.quick] if quick else chosen


def available(methods: Iterable[str]) -> list[str]:
    """Those of the methods that this version has."""
    names = {*registry.names(), "base", "pooled", *(own.name for own in oracle.METHODS)}
    return [method for method in methods if method.partition("[")[0] in names]


def tuning(fields: Sequence[Field]) -> list[Trial]:
    """The same learning rates for every method of every field, on the tuning seed."""
    trials = []
    for field in fields:
        methods = {method.partition("[")[0] for method in available(field.methods)}
        for method in sorted(methods - {"base"}):
            text = next(each for each in field.methods if each.partition("[")[0] == method)
            plain_text = text if "uniform_rank" in text else method
            trials += [
                trial(field, plain_text, TUNING_SEED, [f"train.lr={rate}"]) for rate in field.rates
            ]
    return trials


def reported(study: Study, fields: Sequence[Field], only: str = "") -> list[Trial]:
    """Seed by seed, so that a stopped study has whole seeds."""
    trials = []
    for field in fields:
        methods, seeds = scope(study, field)
        for seed in seeds:
            trials += [
                trial(field, method, seed, study.tuned(field, method))
                for method in available(methods)
                if not only or method in only or method.partition("[")[0] in only.split(",")
            ]
    return trials


def scope(study: Study, field: Field) -> tuple[Sequence[str], Sequence[int]]:
    """The methods and seeds of a field: in a quick study, the ceilings of one seed where the model
    is real, and the systems too where it is planted.
    """
    if not study.quick:
        return field.methods, study.seeds
    if field.planted is None:
        return [method for method in field.methods if method in ANCHORS], study.seeds[:1]
    return [method for method in field.methods if method in (*ANCHORS, *SYSTEMS)], study.seeds


def missing(trials: Iterable[Trial], study: Study) -> list[Trial]:
    return [each for each in trials if known(each, study.cache) is None]


def seconds(wanted: Trial, study: Study) -> float:
    """What a run takes: as others of its field took, else the field's guess."""
    taken = []
    for path in (study.cache / wanted.field.name).glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        taken.append(Record(**content).seconds)
    if taken:
        return median(taken)
    return wanted.field.guess * (0.3 if study.quick else 1.0)


def announce(stages: Sequence[Sequence[Trial]], study: Study) -> None:
    """How many runs, and for how long, field by field."""
    wanted = [each for stage in stages for each in stage]
    left = missing(wanted, study)
    total = 0.0
    for name in dict.fromkeys(each.field.name for each in wanted):
        own = [each for each in left if each.field.name == name]
        spent = sum(seconds(each, study) for each in own[:1]) * len(own)
        total += spent
        have = sum(each.field.name == name for each in wanted) - len(own)
        print(f"{name:20} {have:4} runs there, {len(own):4} to make, about {_time(spent)}")
    print(
        f"{'all':20} {len(wanted) - len(left):4} runs there, {len(left):4} to make, about {_time(total)}"
    )
    print(flush=True)


def _time(spent: float) -> str:
    if spent < 5400:
        return f"{spent / 60:.0f} minutes"
    return f"{spent / 3600:.1f} hours"


def work(trials: Sequence[Trial], study: Study, scratch: Path, deadline: float | None) -> bool:
    """Make what is missing; False where the time is over before all is done."""
    left = missing(trials, study)
    for number, each in enumerate(left, start=1):
        if deadline is not None and time.monotonic() + seconds(each, study) > deadline:
            print(f"no time for the other {len(left) - number + 1} runs; start again to go on")
            return False
        print(f"[{number}/{len(left)}] {each.label}", end=" ", flush=True)
        try:
            record = made(each, study.cache, scratch)
        except FedgroveError as error:
            print(f"is left out: {error}", flush=True)
            continue
        print(f"{record.seconds:.0f} s", flush=True)
    return True


def write(study: Study, fields: Sequence[Field], folder: Path) -> None:
    """Tables, claims and pictures of the runs that there are."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [FieldResult(study, field) for field in fields]
    results = [result for result in results if result.runs]
    claims = plain(judged(study, [field.name for field in fields]))
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }
    content = {
        "machine": machine,
        "seeds": list(study.seeds),
        "claims": claims,
        "fields": {
            result.field.name: {
                "ceilings": result.ceilings(),
                "honest": result.honest(),
                "methods": result.table(),
            }
            for result in results
        },
    }
    text = json.dumps(plain(content), indent=1) + "\n"
    (folder / "evidence.json").write_text(text, encoding="utf-8")
    tables = [pages.field_table(result) for result in results]
    claimed = pages.claims_table(claims)
    whole = "\n".join(["# The evidence\n", claimed, "", *tables, pages.machine_note(machine)])
    (folder / "evidence.md").write_text(whole, encoding="utf-8")
    for result in results:
        pictures.draw(result, folder)
        print(f"{result.field.name:20} {pages.ceilings_line(result)}")
    if not study.quick and len(fields) == len(FIELDS):
        run = [row for row in claims if row["effect"] is not None]
        pages.replaced(RESULTS_PAGE, pages.claims_table(run))
    print(f"written: {folder / 'evidence.md'}")


if __name__ == "__main__":
    main()
