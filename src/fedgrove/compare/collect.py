"""From finished runs to the numbers of a comparison, as plain data: the content of
``compare.json``.

Statistics over clients first (mean, tail: the 10th percentile, worst), one number for each seed;
then mean and sample standard deviation (n − 1) over seeds, which is None with one seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import fedgrove
from fedgrove.compare.campaign import Attempt, FinishedRun, Tuned, fingerprint
from fedgrove.compare.entries import POOLED, Entry, trial_name
from fedgrove.compare.statistics import holm, paired
from fedgrove.ground import words
from fedgrove.ground.plain import Given, Plain
from fedgrove.ground.statistics import RESAMPLES, mean, present, std, tail10
from fedgrove.use.result import Result

MEASURES = ("metric", "metric_tuned")
PARAMETERS = ("trained", "stored", "sent_up", "sent_down")

Values = dict[str, dict[str, float]]  # seed -> client -> number


def collect(done: FinishedRun) -> Plain:
    """Everything that the tables, the tests and the page show."""
    plan = done.plan
    first = done.results[plan.reference.label]
    rows = []
    values: list[float] = []
    for entry in plan.entries:
        row = _row(
            entry,
            done.tuned[entry.label],
            done.results[entry.label],
            plan.seeds,
        )
        rows.append(row)
        values.extend(_flat(row, "metric").values())
    job = first[0].job
    summary = first[0].summary
    base_values = _values(first, plan.seeds, "metric_base", held_out=False)
    writes = summary.get("task") == "generate"
    if writes:
        base_label = "base"
    else:
        base_label = "base, head alone"
    fingerprints = {}
    for seed, run in zip(plan.seeds, first, strict=True):
        fingerprints[str(seed)] = fingerprint(run.path)
    content: Plain = {
        "format": 1,
        "fedgrove": fedgrove.__version__,
        "metric": summary.get("metric", "score"),
        "percent": words.shares(values),
        "writes": writes,
        "head": job.federation.head,
        "model": job.model.name,
        "data": job.data.called,
        "rounds": job.run.rounds,
        "final_local_epochs": job.train.final_local_epochs,
        "clients": _trained(first[0]),
        "held_out": summary.get("unseen", {}).get("clients", 0),
        "seeds": list(plan.seeds),
        "fingerprints": fingerprints,
        "tuning": _tuning(done),
        "base": {
            "label": base_label,
            "metric": _statistics(base_values),
            "values": {"metric": base_values},
        },
        "methods": rows,
        "notes": [*plan.notes, *_machines(done), *_sampled(first)],
        "job": plan.base.to_dict(),
    }
    content["tests"] = {measure: tests(rows, measure) for measure in MEASURES}
    return content


def tests(rows: Sequence[Given], measure: str) -> Plain:
    """Every method against the one with the highest mean, paired over seeds × clients, with Holm's
    adjustment.
    """

    def level(row: Given) -> float:
        found: float | None = row[measure]["mean"]
        if found is None:
            return -math.inf
        return found

    methods = [row for row in rows if row.get("method") != POOLED]  # no yardstick is the best
    best = max(methods or rows, key=level)
    reference = _flat(best, measure)
    found: dict[str, Plain] = {}
    for row in rows:
        if row is best:
            continue
        ours = _flat(row, measure)
        both = [key for key in reference if key in ours]
        if both:
            mine = [ours[key] for key in both]
            other = [reference[key] for key in both]
            pair = paired(mine, other)
            found[row["label"]] = vars(pair) | {"p_holm": None}
    adjusted = holm({label: test["p"] for label, test in found.items()})
    for label, p in adjusted.items():
        found[label]["p_holm"] = p
    return {
        "best": best["label"],
        "test": "two-sided Wilcoxon signed-rank, Holm-adjusted",
        "interval": "95 % percentile bootstrap of the mean difference, "
        f"up to {RESAMPLES} resamples of pairs",
        "against_best": found,
    }


def _row(
    entry: Entry,
    tuned: Tuned,
    results: Sequence[Result],
    seeds: Sequence[int],
) -> Plain:
    seen = {measure: _values(results, seeds, measure, held_out=False) for measure in MEASURES}
    unseen = {measure: _values(results, seeds, measure, held_out=True) for measure in MEASURES}
    losses = _values(results, seeds, "loss", held_out=False)
    of_newcomers = None
    if any(unseen["metric"].values()):
        of_newcomers = {measure: _statistics(values) for measure, values in unseen.items()}
    summaries = [result.summary for result in results]
    seconds = [summary["seconds"]["total"] for summary in summaries]
    return {
        "label": entry.label,
        "method": entry.method,
        "options": list(entry.options),
        "runs": f"runs/{entry.slug}",
        "chosen": dict(tuned.chosen),
        **{measure: _statistics(values) for measure, values in seen.items()},
        "loss": _statistics(losses),
        "unseen": of_newcomers,
        "parameters": _means(summaries, "parameters", PARAMETERS),
        "bytes": _means(summaries, "bytes", ("up", "down")),
        "seconds": fmean(seconds),
        "curve": _curve(results),
        "values": seen,
        "values_unseen": unseen,
    }


def _means(
    summaries: Sequence[Given],
    section: str,
    keys: Sequence[str],
) -> Plain:
    """The means over runs of the numbers of one section of their summaries."""
    found: Plain = {}
    for key in keys:
        numbers = [summary[section][key] for summary in summaries]
        found[key] = _whole(fmean(numbers))
    return found


def _values(
    results: Sequence[Result],
    seeds: Sequence[int],
    key: str,
    *,
    held_out: bool,
) -> Values:
    """``{seed: {client: number}}`` of the clients that trained, or of those that never did."""
    found: Values = {}
    for seed, result in zip(seeds, results, strict=True):
        numbers = {}
        for name, row in result.summary["clients"].items():
            newcomer = bool(row.get("held_out"))
            value = row.get(key)
            if newcomer == held_out and value is not None:
                numbers[name] = float(value)
        found[str(seed)] = numbers
    return found


def _statistics(values: Values) -> Plain:
    """Over clients, then over seeds; ``spread`` is the standard deviation over clients."""
    by_seed = [list(each.values()) for each in values.values() if each]
    means = [mean(each) for each in by_seed]
    tails = [tail10(each) for each in by_seed]
    worst = [min(each) for each in by_seed]
    spreads = [std(each) for each in by_seed]
    return {
        "mean": _mean(means),
        "std": _std(means),
        "tail10": _mean(tails),
        "tail10_std": _std(tails),
        "worst": _mean(worst),
        "spread": _mean(spreads),
        "by_seed": means,
    }


def _curve(results: Sequence[Result]) -> list[Plain]:
    """The mean client after each evaluated round: mean, lowest and highest seed, and the bytes of
    all until then.
    """
    scores: dict[int, list[float]] = {}
    totals: dict[int, list[int]] = {}
    for result in results:
        for round, (score, total) in _course(result).items():
            scores.setdefault(round, []).append(score)
            totals.setdefault(round, []).append(total)
    points = []
    for round, by_seed in sorted(scores.items()):
        point = {
            "round": round,
            "bytes": _whole(fmean(totals[round])),
            "mean": fmean(by_seed),
            "low": min(by_seed),
            "high": max(by_seed),
        }
        points.append(point)
    return points


def _course(result: Result) -> dict[int, tuple[float, int]]:
    """(mean client, bytes of all until then) by evaluated round of one run."""
    metric = str(result.summary.get("metric"))
    sent: dict[int, int] = {}
    scores: dict[int, list[float | None]] = {}
    for line in result.metrics():
        round = line["round"]
        if line["split"] == "train":
            before = sent.get(round, 0)
            sent[round] = before + line["bytes_up"] + line["bytes_down"]
        elif line["split"] == "test":
            values = scores.setdefault(round, [])
            values.append(line.get(metric))
    found = {}
    for round, values in scores.items():
        if present(values):
            total = sum(amount for each, amount in sent.items() if each <= round)
            found[round] = (mean(values), total)
    return found


def _machines(done: FinishedRun) -> list[str]:
    """A sentence where the runs were not all computed alike, as after going on with a comparison
    elsewhere.
    """
    kinds = set()
    for runs in done.results.values():
        for run in runs:
            train = run.job.train
            kinds.add(f"{train.device} in {train.dtype}")
    if len(kinds) <= 1:
        return []
    listed = ", ".join(sorted(kinds))
    return [
        f"The runs were not all computed alike ({listed}); small differences may come from that."
    ]


def _trained(result: Result) -> int:
    """Clients that trained."""
    rows = result.summary["clients"].values()
    return sum(not row.get("held_out") for row in rows)


def _sampled(results: Sequence[Result]) -> list[str]:
    """A sentence where not all clients were measured; with the same seed and rounds the methods
    measured the same ones.
    """
    told = results[0].summary.get("measured")
    if not told:
        return []
    return [
        f"Each run measured {told['clients']:,} of its {told['of']:,} clients (run.evaluate); means, "
        "tails and tests are over those, the same ones for every method of a seed."
    ]


def _tuning(done: FinishedRun) -> Plain | None:
    if not done.plan.knobs:
        return None
    held = done.plan.base.data.validation_fraction
    job = done.plan.trial_job(done.plan.reference, done.plan.trials[0])
    methods = {}
    for label, tuned in done.tuned.items():
        methods[label] = {
            "chosen": dict(tuned.chosen),
            "trials": [_tried(attempt) for attempt in tuned.attempts],
        }
    return {
        "seed": done.plan.tune_seed,
        "validation_fraction": job.data.validation_fraction,
        "validation_held_out_in_reported_runs": bool(held),
        "keys": [knob.key for knob in done.plan.knobs],
        "methods": methods,
    }


def _tried(attempt: Attempt) -> Plain:
    return {
        "name": trial_name(attempt.trial),
        "values": dict(attempt.trial),
        "score": attempt.score,
        "problem": attempt.problem,
    }


def _flat(row: Given, measure: str) -> dict[tuple[str, str], float]:
    """``{(seed, client): number}``."""
    found = {}
    for seed, numbers in row["values"][measure].items():
        for name, value in numbers.items():
            found[seed, name] = value
    return found


def _mean(values: Sequence[float]) -> float | None:
    if values:
        return fmean(values)
    return None


def _std(values: Sequence[float]) -> float | None:
    if len(values) > 1:
        return stdev(values)
    return None


def _whole(value: float) -> int | float:
    if value == int(value):
        return int(value)
    return value
