"""What the cached runs come to: tables, ceilings, claims; plain data, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedgrove.tracking.summary import mean
from study import effects
from study.claims import CLAIMS, Claim
from study.effects import Effect
from study.fields import FIELDS, Field
from study.trials import Record, known, trial

#: the seed of the tuning trials; it is never reported
TUNING_SEED = 1000
#: what makes a field honest (issue 17): adapters matter, and kinds conflict
POINTS, SHARE = 0.08, 0.15
CONFLICT_POINTS, CONFLICT_SHARE = 0.03, 0.05


@dataclass(frozen=True)
class Study:
    """Where the runs are, which seeds are reported, and what is set on top of every job."""

    cache: Path
    seeds: tuple[int, ...]
    quick: bool = False

    def changes(self, field: Field) -> tuple[str, ...]:
        return field.quick if self.quick else ()

    def rate(self, field: Field, method: str) -> float | None:
        """The learning rate that was best on the tuning seed; None where not all were tried."""
        losses = {}
        for rate in field.rates:
            tried = trial(field, method, TUNING_SEED, [f"train.lr={rate}"])
            record = known(tried, self.cache)
            if record is None:
                return None
            losses[rate] = mean(scores(record, field).values())
        best = max if field.higher else min
        return best(losses, key=lambda rate: losses[rate])

    def tuned(self, field: Field, method: str) -> tuple[str, ...]:
        """The settings of a method's reported runs: its variants have the rate of the method."""
        name = method.partition("[")[0]
        rate = None if self.quick or name == "base" else self.rate(field, name)
        if rate is None or rate == written_rate(field):
            return self.changes(field)
        return (*self.changes(field), f"train.lr={rate}")

    def runs(self, field: Field, method: str) -> dict[int, Record]:
        """By seed, as far as they were made."""
        found = {}
        for seed in self.seeds:
            wanted = trial(field, method, seed, self.tuned(field, method))
            record = known(wanted, self.cache)
            if record is not None:
                found[seed] = record
        return found


def written_rate(field: Field) -> float:
    """The learning rate of the field's job."""
    written = trial(field, "fedit", 0).written
    return float(written.get("train", {}).get("lr", 1e-3))


def scores(record: Record, field: Field, metric: str | None = None) -> dict[str, float]:
    """The measure of each client after the last round."""
    last = record.rounds[max(record.rounds, key=int)]
    return {client: values[metric or field.metric] for client, values in sorted(last.items())}


def all_scores(runs: dict[int, Record], field: Field) -> effects.Scores:
    return {seed: scores(record, field) for seed, record in runs.items()}


@dataclass(frozen=True)
class FieldResult:
    """Everything that the pages say of one field."""

    study: Study
    field: Field

    @cached_property
    def runs(self) -> dict[str, dict[int, Record]]:
        """By method and seed."""
        found = {method: self.study.runs(self.field, method) for method in self.field.methods}
        return {method: runs for method, runs in found.items() if runs}

    def scores(self, method: str) -> effects.Scores:
        return all_scores(self.runs.get(method, {}), self.field)

    def effect(self, better: str, worse: str, part: str = "mean") -> Effect | None:
        """How much better one method is than another, as the field measures it."""
        compare = effects.tails if part == "tail" else effects.paired
        return compare(self.scores(better), self.scores(worse), higher=self.field.higher)

    def ceilings(self) -> dict[str, Any]:
        """What the best adapters reach above the base, and the true groups above one for all.

        Where clients have no true groups, each is a group of its own: training alone.
        """
        base = self.effect("oracle", "base"), self.effect("pooled", "base")
        gains = [effect.mean for effect in base if effect is not None]
        one = "fedit" if "fedit" in self.runs else "fedit[uniform_rank=max]"
        oracle = "oracle" if "oracle" in self.runs else "oracle[uniform_rank=max]"
        conflict = self.effect(oracle, one)
        grouped = any(method.startswith("oracle") for method in self.field.methods)
        if not grouped:
            conflict = self.effect("local", one)
        if not gains and (other := self.effect(oracle, "base")) is not None:
            gains = [other.mean]
        found: dict[str, Any] = {
            "oracle above base": base[0] and asdict(base[0]),
            "pooled above base": base[1] and asdict(base[1]),
            "oracle above FedIT": None,
            "local above FedIT": None,
            "adapters matter": None,
            "kinds conflict": None,
        }
        if conflict is not None:
            name = "oracle above FedIT" if grouped else "local above FedIT"
            found[name] = asdict(conflict)
        if gains and self.scores("base"):
            gain = max(gains)
            level = effects.mean(self.scores("base"))
            found["adapters matter"] = gain >= (POINTS if self.field.higher else SHARE * level)
        if conflict is not None:
            level = effects.mean(self.scores(one))
            needed = CONFLICT_POINTS if self.field.higher else CONFLICT_SHARE * level
            found["kinds conflict"] = conflict.mean >= needed
        return found

    def honest(self) -> bool | None:
        """Whether claims may rest on this field; None: not known yet."""
        ceilings = self.ceilings()
        both = [ceilings["adapters matter"], ceilings["kinds conflict"]]
        return None if None in both else all(both)

    def table(self) -> list[dict[str, Any]]:
        """A row for each method that was run."""
        rows = []
        for method, runs in self.runs.items():
            each = [scores(record, self.field) for record in runs.values()]
            tails = [effects.tail(values, higher=self.field.higher) for values in each]
            rows.append(
                {
                    "method": method,
                    "seeds": sorted(runs),
                    self.field.metric: mean([mean(values.values()) for values in each]),
                    "tail": mean(tails),
                    **self._beside(runs),
                    "bytes": mean([sum(record.bytes.values()) for record in runs.values()]),
                    "steps": mean([sum(record.steps.values()) for record in runs.values()]),
                    "cpu_seconds": mean([record.cpu_seconds for record in runs.values()]),
                    "recovery": self.recovery(method),
                    "settings": list(self.study.tuned(self.field, method)),
                }
            )
        return rows

    def _beside(self, runs: dict[int, Record]) -> dict[str, float]:
        """The task's own metric, where the claims go by the loss."""
        metric = next(iter(runs.values())).metric
        if metric == self.field.metric:
            return {}
        values = [
            value
            for record in runs.values()
            for value in scores(record, self.field, metric).values()
        ]
        return {metric: mean(values)}

    def recovery(self, method: str) -> list[float] | None:
        """By layer, the adjusted Rand index of the found groups; of the planted or true groups."""
        found = []
        for record in self.runs[method].values():
            layers = layers_of(record)
            if layers is None:
                return None
            found.append(
                [
                    effects.recovery(groups, self.truth(number, groups))
                    for number, groups in enumerate(layers)
                ]
            )
        return [mean(values) for values in zip(*found, strict=True)] if found else None

    def truth(self, layer: int, groups: Sequence[Sequence[str]]) -> dict[str, int]:
        """The true group of each client in a layer."""
        from study.oracle import group_of

        names = sorted(name for group in groups for name in group)
        if self.field.planted is not None:
            known = self.field.planted.clients()
            depth = len(self.field.planted.counts)
            return {
                name: self.field.planted.node(min(layer, depth - 1), known[name]) for name in names
            }
        kinds = sorted({group_of(name) for name in names})
        return {name: kinds.index(group_of(name)) for name in names}


def layers_of(record: Record) -> list[list[list[str]]] | None:
    """The groups that a method found, layer by layer (HiLoRA's are the same in all); None where it
    has none.
    """
    for content in record.artefacts.values():
        if "labels" in content:
            labels = dict(zip(content["clients"], content["labels"], strict=True))
            labels |= content.get("late", {})
            groups: dict[int, list[str]] = {}
            for name, label in sorted(labels.items()):
                groups.setdefault(label, []).append(name)
            return [list(groups.values())] * len(content["layers"])
        if "layers" in content:
            return [layer["groups"] for layer in content["layers"]]
    return None


def verdict(effect: Effect | None, honest: bool | None) -> tuple[str, str]:
    """*shown*, *not shown here*, *contradicted* or *not run yet*, and why."""
    if effect is None:
        return "not run yet", "a run of the pair is missing"
    if not effect.known:
        return "not shown here", "one seed, so no interval"
    if effect.low > 0 and honest:
        return "shown", "the interval lies above zero"
    if effect.high < 0 and honest:
        return "contradicted", "the interval lies below zero"
    if effect.low > 0:
        return "not shown here", "ahead, but the field's ceilings do not carry claims"
    if effect.high < 0:
        return "not shown here", "behind, but the field's ceilings do not carry claims"
    return "not shown here", "the interval holds zero"


def judged(study: Study, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The claims table."""
    results = {name: FieldResult(study, FIELDS[name]) for name in fields}
    return [_judged(claim, results[claim.field]) for claim in CLAIMS if claim.field in results]


def _judged(claim: Claim, result: FieldResult) -> dict[str, Any]:
    effect = result.effect(claim.better, claim.worse, claim.part)
    said, why = verdict(effect, result.honest())
    return {**asdict(claim), "effect": effect and asdict(effect), "verdict": said, "why": why}


def plain(value: Any) -> Any:
    """The same with None for what is no number."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value
