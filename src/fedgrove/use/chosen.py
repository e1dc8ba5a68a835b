"""Which model is meant: a client of a run, or an adapter directory by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgrove.aggregate.foreign import is_adapter
from fedgrove.ground.errors import RunError
from fedgrove.use.one import OneModel
from fedgrove.use.result import Result

_OF_A_RUN = ("summary.json", "job.toml")


def chosen(
    path: Path,
    client: str | None,
    *,
    base: str | None = None,
    labels: Sequence[str] | None = None,
    settings: Sequence[str] = (),
) -> OneModel:
    """A client of the run ``path``, or the adapter directory ``path``. Raises ``RunError`` where it
    is neither, or a client is missing or has no use.
    """
    if not is_bare(path):
        if path.is_dir() and not any((path / name).exists() for name in _OF_A_RUN):
            raise RunError(
                f"{path} is neither a run nor an adapter directory; name a run, or one directory "
                "such as RUN/adapters/CLIENT."
            )
        result = Result(path)
        if client is None:
            known = ", ".join(result.models())
            raise RunError(f"{path} is a run; give one of its clients with --client ({known}).")
        found: OneModel = result.client(client)
        found.base, found.labels, found.settings = base, labels, settings
        return found
    if client is not None:
        raise RunError(f"{path} is one adapter; leave out --client {client}.")
    return OneModel(path, base=base, labels=labels, settings=settings)


def is_bare(path: Path) -> bool:
    """Whether a directory is one adapter (or merged model), not a run."""
    return is_adapter(path) and not (path / "summary.json").exists()
