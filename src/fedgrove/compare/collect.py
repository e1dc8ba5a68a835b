"""From finished runs to the numbers of a comparison, as plain data: the content of
``compare.json``.

Statistics over clients first (mean, tail: the 10th percentile, worst), one number for each seed;
then mean and sample standard deviation (n − 1) over seeds, which is None with one seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import fedgrove
from fedgrove.compare.campaign import Done, Tuned, fingerprint
from fedgrove.compare.entries import Entry, trial_name
from fedgrove.compare.statistics import RESAMPLES, holm, paired
from fedgrove.ground import words
from fedgrove.ground.statistics import mean, present, std, tail10
from fedgrove.use.result import Result

MEASURES = ("metric", "metric_tuned")
PARAMETERS = ("trained", "stored", "sent_up", "sent_down")


def collect(done: Done) -> dict[str, Any]:
    """Everything that the tables, the tests and the page show."""
    plan = done.plan
    first = done.results[plan.reference.label]
    rows = [
        _row(entry, done.tuned[entry.label], done.results[entry.label], plan.seeds)
        for entry in plan.entries
    ]
    job = first[0].job
    trained = _values(first, plan.seeds, "metric", held_out=False)
    base_values = _values(first, plan.seeds, "metric_base", held_out=False)
    values = [
        value
        for row in rows
        for by_client in row["values"]["metric"].values()
        for value in by_client.values()
    ]
    writes = first[0].summary.get("task") == "generate"
    if writes:
        base_label = "base"
    else:
        base_label = "base, head alone"
    content: dict[str, Any] = {
        "format": 1,
        "fedgrove": fedgrove.__version__,
        "metric": first[0].summary.get("metric", "score"),
        "percent": words.shares(values),
        "writes": writes,
        "head": job.federation.head,
        "model": job.model.name,
        "data": job.data.called,
        "rounds": job.run.rounds,
        "final_local_epochs": job.train.final_local_epochs,
        "clients": len(next(iter(trained.values()), {})),
        "held_out": first[0].summary.get("unseen", {}).get("clients", 0),
        "seeds": list(plan.seeds),
        "fingerprints": {
            str(seed): fingerprint(run.path) for seed, run in zip(plan.seeds, first, strict=True)
        },
        "tuning": _tuning(done),
        "base": {
            "label": base_label,
            "metric": _statistics(base_values),
            "values": {"metric": base_values},
        },
        "methods": rows,
        "notes": [*plan.notes, *_machines(done)],
        "job": plan.base.to_dict(),
    }
    content["tests"] = {measure: tests(rows, measure) for measure in MEASURES}
    return content


def tests(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    """Every method against the one with the highest mean, paired over seeds × clients, with Holm's
    adjustment.
    """
    best = max(
        rows, key=lambda row: -math.inf if row[measure]["mean"] is None else row[measure]["mean"]
    )
    reference = _flat(best, measure)
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        ours = _flat(row, measure)
        both = [pair for pair in reference if pair in ours]
        if row is not best and both:
            pair = paired([ours[key] for key in both], [reference[key] for key in both])
            found[row["label"]] = vars(pair) | {"p_holm": None}
    for label, p in holm({label: test["p"] for label, test in found.items()}).items():
        found[label]["p_holm"] = p
    return {
        "best": best["label"],
        "test": "two-sided Wilcoxon signed-rank, Holm-adjusted",
        "interval": "95 % percentile bootstrap of the mean difference, "
        f"up to {RESAMPLES} resamples of pairs",
        "against_best": found,
    }


def _row(
    entry: Entry, tuned: Tuned, results: Sequence[Result], seeds: Sequence[int]
) -> dict[str, Any]:
    seen = {measure: _values(results, seeds, measure, held_out=False) for measure in MEASURES}
    unseen = {measure: _values(results, seeds, measure, held_out=True) for measure in MEASURES}
    summaries = [result.summary for result in results]
    return {
        "label": entry.label,
        "method": entry.method,
        "options": list(entry.options),
        "runs": f"runs/{entry.slug}",
        "chosen": dict(tuned.chosen),
        **{measure: _statistics(values) for measure, values in seen.items()},
        "loss": _statistics(_values(results, seeds, "loss", held_out=False)),
        "unseen": {measure: _statistics(values) for measure, values in unseen.items()}
        if any(unseen["metric"].values())
        else None,
        "parameters": {
            key: _whole(fmean(s["parameters"][key] for s in summaries)) for key in PARAMETERS
        },
        "bytes": {way: _whole(fmean(s["bytes"][way] for s in summaries)) for way in ("up", "down")},
        "seconds": fmean(s["seconds"]["total"] for s in summaries),
        "curve": _curve(results),
        "values": seen,
        "values_unseen": unseen,
    }


def _values(
    results: Sequence[Result], seeds: Sequence[int], key: str, *, held_out: bool
) -> dict[str, dict[str, float]]:
    """``{seed: {client: number}}`` of the clients that trained, or of those that never did."""
    return {
        str(seed): {
            name: float(row[key])
            for name, row in result.summary["clients"].items()
            if bool(row.get("held_out")) == held_out and row.get(key) is not None
        }
        for seed, result in zip(seeds, results, strict=True)
    }


def _statistics(values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Over clients, then over seeds; ``spread`` is the standard deviation over clients."""
    by_seed = [list(each.values()) for each in values.values() if each]
    means = [mean(each) for each in by_seed]
    tails = [tail10(each) for each in by_seed]
    return {
        "mean": _mean(means),
        "std": _std(means),
        "tail10": _mean(tails),
        "tail10_std": _std(tails),
        "worst": _mean([min(each) for each in by_seed]),
        "spread": _mean([std(each) for each in by_seed]),
        "by_seed": means,
    }


def _curve(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The mean client after each evaluated round: mean, lowest and highest seed, and the bytes of
    all until then.
    """
    points: dict[int, list[tuple[float, int]]] = {}
    for result in results:
        metric = str(result.summary.get("metric"))
        sent: dict[int, int] = {}
        scores: dict[int, list[float | None]] = {}
        for line in result.metrics():
            if line["split"] == "train":
                sent[line["round"]] = (
                    sent.get(line["round"], 0) + line["bytes_up"] + line["bytes_down"]
                )
            elif line["split"] == "test":
                scores.setdefault(line["round"], []).append(line.get(metric))
        for round, values in scores.items():
            if present(values):
                total = sum(amount for each, amount in sent.items() if each <= round)
                points.setdefault(round, []).append((mean(values), total))
    return [
        {
            "round": round,
            "bytes": _whole(fmean(total for _, total in each)),
            "mean": fmean(score for score, _ in each),
            "low": min(score for score, _ in each),
            "high": max(score for score, _ in each),
        }
        for round, each in sorted(points.items())
    ]


def _machines(done: Done) -> list[str]:
    """A sentence where the runs were not all computed alike, as after going on with a comparison
    elsewhere.
    """
    kinds = {
        (run.job.train.device, run.job.train.dtype)
        for runs in done.results.values()
        for run in runs
    }
    listed = ", ".join(" in ".join(kind) for kind in sorted(kinds))
    return [
        f"The runs were not all computed alike ({listed}); small differences may come from that."
    ] * (len(kinds) > 1)


def _tuning(done: Done) -> dict[str, Any] | None:
    if not done.plan.knobs:
        return None
    held = done.plan.base.data.validation_fraction
    job = done.plan.trial_job(done.plan.reference, done.plan.trials[0])
    return {
        "seed": done.plan.tune_seed,
        "validation_fraction": job.data.validation_fraction,
        "validation_held_out_in_reported_runs": bool(held),
        "keys": [knob.key for knob in done.plan.knobs],
        "methods": {
            label: {
                "chosen": dict(tuned.chosen),
                "trials": [
                    {
                        "name": trial_name(a.trial),
                        "values": dict(a.trial),
                        "score": a.score,
                        "problem": a.problem,
                    }
                    for a in tuned.attempts
                ],
            }
            for label, tuned in done.tuned.items()
        },
    }


def _flat(row: Mapping[str, Any], measure: str) -> dict[tuple[str, str], float]:
    return {
        (seed, name): value
        for seed, each in row["values"][measure].items()
        for name, value in each.items()
    }


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
