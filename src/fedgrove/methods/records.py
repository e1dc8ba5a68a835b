"""Records that several methods have in common: what a server keeps, what goes down, stays or goes
up, where it is no more than one adapter, or nothing.

A method with more to say writes a frozen dataclass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedgrove.adapters.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Nothing:
    """Nothing is kept, or nothing travels."""


@dataclass(frozen=True, eq=False)
class Whole:
    """The one adapter of all clients: a server's state, and what it offers."""

    whole: Adapter


@dataclass(frozen=True, eq=False)
class Own:
    """A client's own adapter, which stays with it; None before it has trained."""

    own: Adapter | None = None


@dataclass(frozen=True, eq=False)
class OneAdapter:
    """The adapter that a client trained, on its way up; empty in a round that sends none."""

    adapter: Adapter = field(default_factory=dict)
