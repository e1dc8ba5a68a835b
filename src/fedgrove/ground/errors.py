"""Errors that a person reads: one sentence that names what is wrong, where, and what to do."""

from __future__ import annotations


class FedgroveError(Exception):
    """Bad input or a bad environment. The command line prints the message alone and exits with
    2.
    """


class JobError(FedgroveError):
    """A key of the job is unknown, has a bad value, or contradicts another."""


class DataError(FedgroveError):
    """A data file, column, label or partition cannot be used as it is."""


class ModelError(FedgroveError):
    """A base model cannot be loaded, or the targets do not fit it."""


class AdapterError(FedgroveError):
    """An adapter (in memory, on disk or on the wire) has wrong sites, shapes, scales or values."""


class RunError(FedgroveError):
    """A run directory is missing, finished, foreign, or cannot be written."""
