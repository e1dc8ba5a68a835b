"""One finished model, wherever its adapter directory lies: asked, measured, exported.

A client of a run (``result.ClientResult``) is one; so is a directory by itself: of a run, of
``fedgrove export`` or ``aggregate``, or of anybody's PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.ground.errors import DataError, RunError
from fedgrove.ground.plain import Given, Plain

if TYPE_CHECKING:
    from fedgrove.federation.readers import Row
    from fedgrove.job import Job
    from fedgrove.use.personal import ClientModel

#: folders of a run in which adapter directories lie
_FOLDERS = ("adapters", "adapters_tuned", "adapted")
#: what transformers calls a class that nobody named
_UNNAMED = re.compile(r"LABEL_\d+")


class OneModel:
    """An adapter directory by itself.

    ``base`` and ``labels`` are as of ``fedgrove.load``; ``settings`` are keys of a job, such as
    ``data.text=review``: the columns of the tables that it is measured on and asked about.
    """

    def __init__(
        self,
        path: Path,
        *,
        base: str | None = None,
        labels: Sequence[str] | None = None,
        settings: Sequence[str] = (),
    ) -> None:
        self.home, self.name = path, path.absolute().name
        self.base, self.labels, self.settings = base, labels, settings

    @property
    def path(self) -> Path:
        """Its adapter directory."""
        return self.home

    @property
    def job(self) -> Job:
        """Whose columns tables have: the job of the run that the directory lies in, else the
        defaults of the adapter's task.
        """
        from fedgrove.job import Job

        run = self.path.absolute().parents[1]
        if self.path.absolute().parent.name in _FOLDERS and (run / "job.toml").is_file():
            found = Job.load(run / "job.toml")
        else:
            found = Job.build(_job_values(self.card()))
        return found.override(self.settings)

    def card(self) -> Plain:
        """What the directory says of the model, as our own ``fedgrove.json`` does."""
        from fedgrove.aggregate.foreign import card_of

        return card_of(self.path, self.labels, self.base)

    def predict(self, texts: Sequence[Any]) -> list[Any]:
        """The most likely label of each text, or of each image (path, bytes or PIL image)."""
        return self.model().predict(texts)

    def evaluate(self, data: str | Path | None = None) -> dict[str, float]:
        """The measures on the client's own test split, or on a table with the job's columns."""
        return self.model().evaluate(self._rows(data))

    def measures(self, data: str | Path | None = None) -> Plain:
        """As ``evaluate``, with every metric of the task and of the job's ``data.metrics``."""
        return self.model().measures(self._rows(data), self.job.data.metrics)

    def _rows(self, data: str | Path | None) -> list[Row]:
        from fedgrove.federation.load import rows_of

        if data is None:
            return self._tests()
        job = self.job
        try:
            return rows_of(Path(data), job)
        except DataError as error:
            if not job.data.classes or not all(map(_UNNAMED.fullmatch, job.data.classes)):
                raise
            raise DataError(
                f"{error} ({self.path} does not name its classes: give them in their order, "
                "labels=..., --labels)"
            ) from error

    def _tests(self) -> list[Row]:
        """The rows that it is measured on where none are given."""
        raise RunError(
            f"{self.path} has no test data of its own; name a table with labels (--data FILE)."
        )

    def export(
        self,
        out: str | Path,
        *,
        merge: bool = False,
        tier: str | None = None,
        rank: int | None = None,
        to: str = "peft",
    ) -> Path:
        """Write the adapter to a new directory, or the whole model with the adapter merged into it.

        ``tier``: one tier alone, of a method that has tiers (HiLoRA: root, cluster, leaf). ``rank``:
        the best approximation with no site above it; ``truncated`` in the card has its error.
        ``to``: "peft", "gguf" (a file for llama.cpp) or "vllm" (one rank and scale at all sites).
        """
        from fedgrove.use.exporting import export

        export(
            self.path,
            Path(out),
            self.base,
            merge=merge,
            tier=tier,
            rank=rank,
            to=to,
        )
        return Path(out)

    def model(self, **options: Any) -> ClientModel:
        """The model, ready to predict; options as of ``fedgrove.load``."""
        from fedgrove.use.personal import load

        return load(self.path, **{"base": self.base, "labels": self.labels, **options})


def _job_values(card: Given) -> dict[str, Plain]:
    """A job that reads tables as the card's task does, with what the card says of it."""
    from fedgrove.federation.tasks import TASKS

    known = TASKS.find(card["task"]).Options.model_fields
    kept = {key: value for key, value in card.items() if key in known and value is not None}
    if len(kept.get("labels", ())) < 2:  # a job names two classes or none
        kept.pop("labels", None)
    data = {"source": "table", "path": "asked", "task": card["task"], **kept}
    return {"model": {"name": str(card["model"])}, "data": data}
