"""How long a federation's rows are in the model's own tokens, and how many of them would be cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedgrove.federation.tasks import task_of
from fedgrove.federation.tasks.seq2seq import as_read
from fedgrove.interop.models import head_kind, load_config, load_processor

if TYPE_CHECKING:
    from fedgrove.federation.federation import Federation
    from fedgrove.job import Job


def lengths(job: Job, federation: Federation) -> dict[str, dict[str, Any]]:
    """``{client: {"median", "p95", "longest", "cut"}}`` over all its rows; {} where rows have no
    length (images).

    Only the tokenizer is loaded, not the model. Raises ``ModelError`` where it cannot be had,
    ``DataError`` for rows that it cannot write.
    """
    config = load_config(job.model.name, job.model.revision)
    task = as_read(task_of(job.data), head_kind(config, "lm"))
    most = getattr(task, "max_length", 0)
    processor = load_processor(job.model.name, job.model.revision, task.name, config)
    found: dict[str, dict[str, Any]] = {}
    for client in federation.clients:
        tokens = task.lengths([*client.train, *client.test, *client.validation], processor)
        if tokens:
            found[client.name] = {
                "median": float(np.median(tokens)),
                "p95": float(np.percentile(tokens, 95)),
                "longest": max(tokens),
                "cut": sum(count > most for count in tokens),
            }
    return found
