"""Whatever has a ``from_pretrained``: from disk where it is there, else from the model hub."""

from __future__ import annotations

import warnings
from logging import getLogger
from pathlib import Path
from typing import Any

from fedgrove.ground.errors import ModelError


def fetched(
    factory: Any,
    name: str,
    place: str,
    revision: str | None,
    **options: Any,
) -> Any:
    """``factory.from_pretrained(place)``, quietly. ``name``: what the job calls it, for the
    sentence of the ``ModelError`` that this raises.
    """
    _hush()
    _check_folder(name, place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return factory.from_pretrained(
                place,
                revision=revision,
                local_files_only=True,
                **options,
            )
        except ImportError as error:
            raise ModelError(
                f"model.name: '{name}' needs a package that is not installed: {_first(error)}"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if Path(place).is_dir():
                raise ModelError(
                    f"model.name: '{name}' cannot be loaded from its folder: {_first(error)}"
                ) from error
        try:
            return factory.from_pretrained(place, revision=revision, **options)
        except Exception as error:  # the hub client raises many kinds
            raise ModelError(
                f"model.name: '{name}' is neither on this machine nor could it be fetched from the "
                f"model hub ({type(error).__name__}); check the name and the network, or give a "
                "local folder."
            ) from error


def _hush() -> None:
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel("ERROR")  # its retries; what comes of them is said


def _check_folder(name: str, place: str) -> None:
    if Path(place).exists() and not Path(place).is_dir():
        raise ModelError(f"model.name: '{name}' is a file; name the folder that holds config.json.")
    if place.startswith((".", "/", "~")) and not Path(place).expanduser().is_dir():
        raise ModelError(f"model.name: the folder '{name}' does not exist.")


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if lines:
        return lines[0][:300]
    return type(error).__name__
