"""A finished run, from Python."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.ground.errors import RunError
from fedgrove.ground.names import folder_of
from fedgrove.ground.plain import Plain
from fedgrove.tracking import metrics
from fedgrove.tracking import summary as summaries
from fedgrove.use.one import OneModel

if TYPE_CHECKING:
    from fedgrove.federation.federation import Federation
    from fedgrove.federation.readers import Row
    from fedgrove.job import Job
    from fedgrove.use.personal import ClientModel

GLOBAL = "_global"  # what the common model is called, among clients and as a folder


class Result:
    """What ``fg.run`` gives back; ``Result("runs/fedit")`` opens a finished run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunError(f"{self.path} does not exist; name the directory of a finished run.")
        self.summary: Plain = summaries.read(self.path / "summary.json")

    @property
    def job(self) -> Job:
        from fedgrove.job import Job

        return Job.load(self.path / "job.toml")

    def names(self) -> list[str]:
        """The clients, held-out ones included."""
        return list(self.summary["clients"])

    def models(self) -> list[str]:
        """The clients, and the common model where the method has one."""
        common = (self.path / "adapters" / GLOBAL).is_dir()
        return [*self.names(), *([GLOBAL] if common else [])]

    def answering(self) -> list[str]:
        """Those of ``models`` that can be measured: where each client kept its head, the common
        model has none that was trained.
        """
        if self.common_head:
            return self.models()
        return self.names()

    @property
    def common_head(self) -> bool:
        """Whether the common model's head is the clients' mean, frozen for all, or needs none."""
        from fedgrove.federation.tasks import task_class

        job = self.job
        mean = job.federation.head != "local" or job.federation.newcomer_head is True
        return mean or task_class(job.data).writes

    @property
    def left_after(self) -> int:
        """The round whose models the clients left with: the last, or the best (``run.keep``)."""
        rounds = int(self.summary["rounds"])
        return int(self.summary.get("kept", {}).get("round", rounds))

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def metrics(self) -> list[Plain]:
        """The lines of metrics.jsonl."""
        return metrics.read(self.path / "metrics.jsonl")

    @cached_property
    def federation(self) -> Federation:
        """The clients' rows, as they were. Raises ``RunError`` where they have changed since."""
        from fedgrove.federation import build
        from fedgrove.runs.prepare import fingerprint_of

        federation = build(self.job)
        then = json.loads((self.path / "federation.json").read_text(encoding="utf-8")).get(
            "fingerprint"
        )
        if fingerprint_of(federation) != then:
            raise RunError(
                f"The data changed since {self.path} was run, and with them who tests on what; "
                f"restore them, or name "
                "rows that nobody was trained on (--data FILE)."
            )
        return federation

    @property
    def tests(self) -> dict[str, list[Row]]:
        """Each client's test rows, as ``federation`` has them."""
        return {client.name: client.test for client in self.federation.clients}

    def client(self, name: str) -> ClientResult:
        """One client's part of the run, or with ``_global`` the common model, whose test data are
        all clients'. Raises ``RunError`` for a name that the run does not have.
        """
        if name not in self.models():
            known = ", ".join(self.models())
            raise RunError(f"{self.path} has no client '{name}'; it has {known}.")
        return ClientResult(self, name)

    def __repr__(self) -> str:
        short = {key: self.summary[key] for key in ("method", "rounds", "mean", "tail10")}
        return f"Result({str(self.path)!r}, {json.dumps(short)})"


class ClientResult(OneModel):
    """One client of a finished run."""

    def __init__(self, result: Result, name: str):
        if name == GLOBAL:
            folder = GLOBAL
        else:
            folder = folder_of(name)
        super().__init__(result.path / "adapters" / folder)
        self.result, self.name = result, name
        self.summary: Plain = result.summary["clients"].get(name, {})

    @property
    def job(self) -> Job:
        """The run's."""
        return self.result.job.override(self.settings)

    def _tests(self) -> list[Row]:
        if self.name == GLOBAL:
            return [row for rows in self.result.tests.values() for row in rows]
        return self.result.tests[self.name]

    def model(self, **options: Any) -> ClientModel:
        """The client's model, ready to predict; options as of ``fedgrove.load``."""
        model = super().model(**options)
        model.headless |= self.name == GLOBAL and not self.result.common_head
        return model
