"""Data split by columns, on sets that scikit-learn brings along and on sentences in several languages.

    python benchmarks/vertical.py tables                  (writes the tables of jobs/vertical/*.toml, two seconds)
    python benchmarks/vertical.py tables --languages      (those of multiemo.toml too: 358 MB to fetch once)
    python benchmarks/vertical.py study                   (five seeds of three sets; minutes of one core)

study     The jobs of jobs/vertical: VIM, VIM-J and split learning, all parties together and (under VIM) each alone; the
          learning rate of each method is the better of two on a seed that is not among the five. Beside them, on the
          same entities: the largest class, logistic regression on all columns in one place, and a network of the
          parties' width on all columns in one place (scikit-learn).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "jobs" / "vertical"
TABLES = JOBS / "tables"
SEEDS = (0, 1, 2, 3, 4)
TUNING = 9  # a seed of its own
RATES = (0.05, 0.1)
METHODS = ("vim", "vim-j", "split")
LANGUAGES = ("en", "de", "pl", "zh")
SENTENCES = 1000


# ------------------------------------------------------------------------------- tables
def cut(name: str) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """(the columns of each party, scikit-learn's set): cell nuclei by statistic, wines by kind of
    measure, digits by quarter of the picture.
    """
    from sklearn import datasets

    if name == "cancer":
        found = datasets.load_breast_cancer()
        columns = [each.replace(" ", "_") for each in found.feature_names]
        parties = {"mean": columns[:10], "error": columns[10:20], "worst": columns[20:]}
    elif name == "wine":
        found = datasets.load_wine()
        columns = [each.replace("/", "_") for each in found.feature_names]
        parties = {"ground": columns[:5], "phenols": columns[5:9], "looks": columns[9:]}
    else:
        found = datasets.load_digits()
        columns = list(found.feature_names)
        parties = {side: [] for side in ("top_left", "top_right", "low_left", "low_right")}
        for column in columns:
            _, row, place = column.rsplit("_", 2)
            upright = "top" if int(row) < 4 else "low"
            parties[f"{upright}_{'left' if int(place) < 4 else 'right'}"].append(column)
    return parties, {"columns": columns, "data": found.data, "target": found.target}


def write_tables(name: str) -> None:
    """A table for each party, rows in an order of its own; labels at the first."""
    parties, found = cut(name)
    TABLES.mkdir(parents=True, exist_ok=True)
    for number, (party, columns) in enumerate(parties.items()):
        places = [found["columns"].index(column) for column in columns]
        order = np.random.default_rng(number).permutation(len(found["data"]))
        with (TABLES / f"{name}-{party}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            label = ["label"] if number == 0 else []
            writer.writerow(["id", *columns, *label])
            for row in order:
                told = [found["target"][row]] if number == 0 else []
                writer.writerow([f"e{row}", *found["data"][row, places], *told])


def write_languages() -> None:
    """MultiEmo's sentences about products, a language for each party; id = the sentence's number."""
    from fedgrove.federation import assets

    members = {
        f"{language}.json": "bigbench-1.0.0/bigbench/benchmark_tasks/multiemo/"
        f"products_sentence_{language}/task.json"
        for language in LANGUAGES
    }
    assets.ASSETS["multiemo"] = assets.Asset(
        "multiemo", "sentences of reviews", "Apache-2.0 (BIG-bench)", assets.BIG_BENCH, members
    )
    folder = assets.asset("multiemo")
    TABLES.mkdir(parents=True, exist_ok=True)
    examples = {
        language: json.loads((folder / f"{language}.json").read_text(encoding="utf-8"))["examples"]
        for language in LANGUAGES
    }
    whole = [
        number
        for number, each in enumerate(zip(*examples.values(), strict=True))
        if all(example["input"].strip() for example in each)
    ]
    for language, own in examples.items():
        with (TABLES / f"multiemo-{language}.jsonl").open("w", encoding="utf-8") as file:
            for number in whole[:SENTENCES]:
                scores = own[number]["target_scores"]
                row = {"id": number, "text": own[number]["input"]}
                if language == LANGUAGES[0]:
                    row["label"] = max(scores, key=scores.get)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------- study
def one(name: str, method: str, seed: int, lr: float, *, alone: bool) -> dict[str, Any]:
    """A run's summary."""
    from fedgrove.vertical import VerticalJob, run, start

    start.write_page = lambda folder: folder  # the study needs no pages
    changes = [
        f"method.name={method}",
        f"run.seed={seed}",
        f"train.lr={lr}",
        f"run.alone={str(alone).lower()}",
    ]
    job = VerticalJob.load(JOBS / f"{name}.toml", changes)
    out = Path(tempfile.mkdtemp())
    try:
        return run(job, out / "run").summary
    finally:
        shutil.rmtree(out)


def tuned(name: str, method: str, lr: float) -> float:
    """Accuracy on the tuning seed; 0 where it diverges."""
    from fedgrove.ground.errors import RunError

    try:
        return float(one(name, method, TUNING, lr, alone=False)["accuracy"])
    except RunError:
        return 0.0


def pooled(name: str, seed: int) -> dict[str, float]:
    """All columns in one place, on the same entities: accuracy of two models of scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    from fedgrove.vertical import VerticalJob
    from fedgrove.vertical.tables import entities, numbers

    job = VerticalJob.load(JOBS / f"{name}.toml", [f"run.seed={seed}"])
    joined = entities(job)
    parts = [numbers(each, job.parties[each], joined.tables[each]) for each in job.speaking]
    x = np.concatenate([part.numpy() for part in parts], axis=1)
    labels = joined.labels.numpy()
    train, test = list(joined.train), list(joined.test)
    x = StandardScaler().fit(x[train]).transform(x)
    width = sum(section.width for section in job.speaking.values())
    models = {
        "logistic": LogisticRegression(max_iter=2000),
        "network": MLPClassifier((width,), max_iter=500, random_state=seed),
    }
    return {
        key: float(model.fit(x[train], labels[train]).score(x[test], labels[test]))
        for key, model in models.items()
    }


def study(names: list[str]) -> dict[str, Any]:
    """All of it, by set and seed."""
    found: dict[str, Any] = {}
    for name in names:
        write_tables(name)
        rates = {}
        for method in METHODS:
            tried = {lr: tuned(name, method, lr) for lr in RATES}
            rates[method] = max(tried, key=lambda lr: tried[lr])
        seeds: list[dict[str, Any]] = []
        for seed in SEEDS:
            runs = {
                method: one(name, method, seed, rates[method], alone=method == "vim")
                for method in METHODS
            }
            vim = runs["vim"]
            seeds.append(
                {
                    "seed": seed,
                    "majority": vim["majority"],
                    "alone": {party: own["alone"] for party, own in vim["parties"].items()},
                    "norm": {party: own["importance"] for party, own in vim["parties"].items()},
                    "without": {party: own["without"] for party, own in vim["parties"].items()},
                    "together": {method: each["accuracy"] for method, each in runs.items()},
                    "bytes": {
                        method: each["bytes_up"] + each["bytes_down"]
                        for method, each in runs.items()
                    },
                    "pooled": pooled(name, seed),
                }
            )
            print(name, seed, seeds[-1]["together"], flush=True)
        found[name] = {"rates": rates, "seeds": seeds}
    return found


def table(found: dict[str, Any]) -> Iterator[str]:
    """Means over seeds and their standard deviations, as Markdown."""
    yield "| set | who | accuracy, % (s.d. of five seeds) | norm of W | all without it |"
    yield "|---|---|---:|---:|---:|"
    for name, each in found.items():
        seeds = each["seeds"]
        yield f"| {name} | largest class | {cell(seed['majority'] for seed in seeds)} | | |"
        for party in seeds[0]["alone"]:
            norm = fmean(seed["norm"][party] for seed in seeds)
            without = cell(seed["without"][party] for seed in seeds)
            alone = cell(seed["alone"][party] for seed in seeds)
            yield f"| | {party} alone | {alone} | {norm:.2f} | {without} |"
        for method in METHODS:
            score = cell(seed["together"][method] for seed in seeds)
            yield f"| | all, {method} (lr {each['rates'][method]:g}) | {score} | | |"
        for model in ("logistic", "network"):
            score = cell(seed["pooled"][model] for seed in seeds)
            yield f"| | all columns in one place, {model} | {score} | | |"


def cell(values: Iterator[float]) -> str:
    many = [100 * value for value in values]
    return f"{fmean(many):.1f} ({stdev(many):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tables", "study"))
    parser.add_argument("--languages", action="store_true", help="also the tables of multiemo.toml")
    parser.add_argument("--sets", nargs="+", default=["cancer", "wine", "digits"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vertical")
    given = parser.parse_args()
    if given.what == "tables":
        for name in given.sets:
            write_tables(name)
        if given.languages:
            write_languages()
        print(f"Wrote {TABLES}.")
        return
    import torch

    from fedgrove.ground.versions import versions

    torch.set_num_threads(1)
    began = time.process_time()
    found = study(given.sets)
    said = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one used",
        "processor_seconds": round(time.process_time() - began, 1),
        "versions": versions(),
        "sets": found,
    }
    lines = list(table(found))
    print(*lines, sep="\n")
    given.out.with_suffix(".json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
