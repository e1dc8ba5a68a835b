"""What a run directory says, read once, as plain data for tables and figures. Nothing here imports
matplotlib.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedgrove.ground import words
from fedgrove.ground.plain import Given, Plain
from fedgrove.report.sections import method_of
from fedgrove.tracking import metrics
from fedgrove.tracking import summary as summaries


@dataclass(frozen=True)
class Run:
    """A finished run. ``notes`` name files that are missing or cannot be read; the report leaves
    those parts out.
    """

    path: Path
    summary: Given
    job: Plain
    job_text: str
    lines: list[Plain]  # metrics.jsonl
    table: Plain | None  # Federation.table()
    versions: dict[str, str]
    notes: tuple[str, ...]

    @property
    def method(self) -> str:
        return str(self.summary.get("method", "?"))

    @cached_property
    def alone(self) -> bool:
        """Whether clients learnt nothing from each other, as its method says; False where the
        method is not installed.
        """
        kind = method_of(self.method)
        return kind is not None and not kind.federated

    @cached_property
    def clients(self) -> dict[str, Plain]:
        """The clients that trained, by name."""
        rows = self.summary["clients"]
        return {name: row for name, row in rows.items() if not row.get("held_out")}

    @cached_property
    def newcomers(self) -> dict[str, Plain]:
        """The clients that never trained."""
        rows = self.summary["clients"]
        return {name: row for name, row in rows.items() if row.get("held_out")}

    def values(self, key: str) -> dict[str, float]:
        """``{client: number}`` over the clients that trained and have one: key ``metric``,
        ``metric_base``, ...
        """
        found = {}
        for name, row in self.clients.items():
            value = _number(row.get(key))
            if value is not None:
                found[name] = value
        return found

    @cached_property
    def metric(self) -> str:
        """What ``metric`` measures, as summary.json says or the evaluation lines call it."""
        if self.summary.get("metric"):
            return str(self.summary["metric"])
        names = filter(None, map(metrics.metric_name, self._tests))
        return next(names, "score")

    @cached_property
    def percent(self) -> bool:
        values: list[float] = []
        for key in ("metric", "metric_base", "metric_tuned"):
            values.extend(self.values(key).values())
        return words.shares(values)

    @cached_property
    def _tests(self) -> list[Plain]:
        """The evaluation lines of the clients that trained."""
        trained = self.clients
        tests = [line for line in self.lines if line["split"] == "test"]
        return [line for line in tests if line["client"] in trained]

    @cached_property
    def trained(self) -> list[Plain]:
        """The lines of training."""
        return [line for line in self.lines if line["split"] == "train"]

    @cached_property
    def history(self) -> dict[int, dict[str, float]]:
        """``{round: {client: metric}}`` of the clients that trained, rounds ascending; only what is
        a number.
        """
        metric = self.metric
        found: dict[int, dict[str, float]] = {}
        for line in self._tests:
            value = _number(line.get(metric))
            if value is not None:
                row = found.setdefault(line["round"], {})
                row[line["client"]] = value
        return dict(sorted(found.items()))

    @cached_property
    def losses(self) -> dict[int, list[float]]:
        """``{round: training losses of its clients}``, numbers only."""
        found: dict[int, list[float]] = {}
        for line in self.trained:
            loss = _number(line.get("loss"))
            if loss is not None:
                losses = found.setdefault(line["round"], [])
                losses.append(loss)
        return dict(sorted(found.items()))

    def over_rounds(self, measure: str) -> dict[int, list[float]]:
        """``{round: one of its clients' measures each}`` of the test data, numbers only."""
        found: dict[int, list[float]] = {}
        for line in self._tests:
            value = _number(line.get(measure))
            if value is not None:
                values = found.setdefault(line["round"], [])
                values.append(value)
        return dict(sorted(found.items()))

    @cached_property
    def broken(self) -> dict[str, int]:
        """``{client: rounds whose training loss was not a number}``."""
        found: dict[str, int] = {}
        for line in self.trained:
            if "loss" in line and _number(line["loss"]) is None:
                client = line["client"]
                found[client] = found.get(client, 0) + 1
        return found

    @cached_property
    def test_sizes(self) -> list[int]:
        """Test examples of each client that trained, as evaluated."""
        sizes: dict[str, int] = {}
        for line in self._tests:
            if _number(line.get("examples")) is not None:
                sizes[line["client"]] = line["examples"]
        return sorted(sizes.values())

    def described(self, name: str) -> Given:
        """The client's row of federation.json, {} where there is none."""
        return self._described.get(name, {})

    @cached_property
    def _described(self) -> dict[str, Given]:
        table = self.table or {}
        return {row["name"]: row for row in table.get("clients", [])}

    @property
    def source(self) -> dict[str, str]:
        """Where the data come from: name, licence, note, checksum, as far as federation.json
        says.
        """
        source = (self.table or {}).get("source")
        if not isinstance(source, dict):
            return {}
        return {key: value for key, value in source.items() if isinstance(value, str) and value}

    @property
    def data_name(self) -> str | None:
        name: str | None = self.source.get("name")
        return name or self.setting("data", "path") or self.setting("data", "name")

    def setting(self, section: str, key: str, default: Any = None) -> Any:
        """One value of the resolved job."""
        part = self.job.get(section)
        if key == "name" and isinstance(part, str):  # model = "roberta-large" is short for its name
            return part
        if isinstance(part, dict):
            return part.get(key, default)
        return default


def load(run_dir: Path) -> Run:
    """Read a run directory. Raises ``RunError`` where summary.json is missing or is none; other
    files may be absent.
    """
    return _read(run_dir, summaries.read(run_dir / "summary.json"))


def load_so_far(run_dir: Path) -> Run:
    """Read the directory of a run that goes on, or stopped: in the summary's place stands what
    metrics.jsonl knows so far.
    """
    run = _read(run_dir, {"clients": {}})
    tests = [line for line in run.lines if line["split"] == "test"]
    metric = next(filter(None, map(metrics.metric_name, tests)), "score")
    rows: dict[str, Plain] = {}
    for described in (run.table or {}).get("clients", []):
        rows[described["name"]] = {"held_out": bool(described.get("held_out"))}
    bytes_up = 0
    bytes_down = 0
    for line in run.lines:
        row = rows.setdefault(line["client"], {"held_out": False})
        if line["split"] == "test":
            row["metric"] = line.get(metric)
        bytes_up += line.get("bytes_up") or 0
        bytes_down += line.get("bytes_down") or 0
    summary = {
        "method": run.setting("method", "name", "?"),
        "task": run.setting("data", "task"),
        "metric": metric,
        "seed": run.setting("run", "seed"),
        "rounds": max((line["round"] for line in run.lines), default=0),
        "clients": rows,
        "bytes": {"up": bytes_up, "down": bytes_down},
    }
    return replace(run, summary=summary)


def _read(run_dir: Path, summary: Given) -> Run:
    """The other files of the directory, as far as they are there."""
    notes: list[str] = []
    job_text = _text(run_dir / "job.toml", notes)
    try:
        job = tomllib.loads(job_text)
    except tomllib.TOMLDecodeError:
        job = {}
        notes.append("job.toml is not valid TOML.")
    lines = metrics.read(run_dir / "metrics.jsonl")
    if not lines:
        notes.append("metrics.jsonl is missing or empty, so there are no curves.")
    table = _json(run_dir / "federation.json", notes)
    versions = {}
    if (run_dir / "versions.json").exists():
        versions = _json(run_dir / "versions.json", notes) or {}
    return Run(
        path=run_dir,
        summary=summary,
        job=job,
        job_text=job_text,
        lines=lines,
        table=table,
        versions=versions,
        notes=tuple(notes),
    )


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        notes.append(f"{path.name} is missing or cannot be read.")
        return ""


def _json(path: Path, notes: list[str]) -> Plain | None:
    text = _text(path, notes)
    content = None
    try:
        if text:
            content = json.loads(text)
    except ValueError:
        notes.append(f"{path.name} is not valid JSON.")
    if isinstance(content, dict):
        return content
    return None


def _number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if math.isfinite(value):
        return float(value)
    return None
