"""``RUN/summary.json``: what a run came to, from plain data. What varies between runs is under
``seconds`` alone.

Statistics are over clients (``fedgrove.ground.statistics``); what is no number is written as
``null``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from fedgrove.ground.errors import RunError
from fedgrove.ground.plain import Given, Plain
from fedgrove.ground.statistics import Value, mean, present, std, tail10

_CLIENT_KEYS = ("examples", "rank", "metric_base", "metric", "metric_tuned", "loss")
_PARAMETER_KEYS = ("trained", "stored", "sent_up", "sent_down")
_SECONDS_KEYS = ("total", "training", "evaluation", "server")


def summarise(
    *,
    method: str,
    task: str,
    seed: int,
    rounds: int,
    clients: Mapping[str, Given],
    parameters: Mapping[str, Sequence[int]],
    bytes_up: int,
    bytes_down: int,
    seconds: Mapping[str, float],
) -> Plain:
    """The content of summary.json, keys in the order of the file.

    ``clients``: ``{name: {examples, rank, metric_base, metric, metric_tuned, loss, held_out}}``; a
    key that is left out is ``None`` (``held_out``: False). ``parameters``: ``{trained, stored,
    sent_up, sent_down}``, each a list with a number for each client (or client and round); the file
    holds the median. ``bytes_up``, ``bytes_down``: the whole run, all clients. ``seconds``:
    ``{total, training, evaluation, server}``. Clients that never trained carry ``"held_out": true``
    and count in ``unseen`` only: as they arrive, and under
    ``tuned`` after local training.
    """
    rows: dict[str, Plain] = {}
    for name in sorted(clients):
        given = clients[name]
        rows[name] = {key: _plain(given.get(key)) for key in _CLIENT_KEYS}
        if given.get("held_out"):
            rows[name]["held_out"] = True
    seen = [row["metric"] for row in rows.values() if "held_out" not in row]
    unseen = [row for row in rows.values() if "held_out" in row]
    result = {
        "method": method,
        "task": task,
        "seed": seed,
        "rounds": rounds,
        "clients": rows,
        **_spread(seen),
    }
    if unseen:
        welcomed = [row["metric"] for row in unseen]
        tuned = [row["metric_tuned"] for row in unseen]
        result["unseen"] = {"clients": len(unseen), **_spread(welcomed)}
        if present(tuned):
            result["unseen"]["tuned"] = _spread(tuned)
    result["parameters"] = {key: _median(parameters[key]) for key in _PARAMETER_KEYS}
    result["bytes"] = {"up": bytes_up, "down": bytes_down}
    result["seconds"] = {key: _plain(seconds[key]) for key in _SECONDS_KEYS}
    return result


def read(path: Path) -> Plain:
    """The content of a summary.json. Raises ``RunError`` where it is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            f"{path.parent} has no {path.name}: the run is not finished; run its job with --resume."
        ) from error
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path} ({error}): restore the file or run the job again in a new "
            f"directory."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("clients"), dict):
        raise RunError(
            f"{path} is not the summary of a run (it has no 'clients'): give the directory of a "
            f"finished run."
        )
    return content


def _spread(values: Sequence[Value]) -> Plain:
    return {
        "mean": _plain(mean(values)),
        "std": _plain(std(values)),
        "tail10": _plain(tail10(values)),
    }


def _plain(value: object) -> object:
    """NaN and infinities have no JSON: ``None``."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _median(values: Sequence[int]) -> float | int:
    """A whole number stays an int (``statistics.median`` of an even count is a float)."""
    if values:
        middle = median(values)
    else:
        middle = 0
    if middle == int(middle):
        return int(middle)
    return middle
