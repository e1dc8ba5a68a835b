"""Clients' rows as a model reads them, encoded when a client is asked and kept for those asked last:
memory does not grow with the clients that are registered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from threading import Lock

from fedgrove.federation.tasks.base import Example

KEPT = 1000  # clients whose rows stay encoded; a federation of no more is encoded once

Splits = Mapping[str, Sequence[Example]]


class Rows(list[Example]):
    """One split of a client. ``origin`` is the same object however often it is encoded."""

    def __init__(self, examples: Sequence[Example], origin: object):
        super().__init__(examples)
        self.origin = origin


def origin_of(examples: Sequence[Example]) -> object:
    """An object that is the same for the same rows: compare it by ``is``."""
    if isinstance(examples, Rows):
        return examples.origin
    return examples


class EncodedClients(Mapping[str, Splits]):
    """``{client: {split: examples}}``. The first ``kept`` clients are encoded at once, so that data
    which cannot be read are mostly refused before a run begins.

    Args:
        encode: a client's splits by its name; the same each time. Raises ``DataError``.
    """

    def __init__(
        self,
        names: Sequence[str],
        encode: Callable[[str], Splits],
        kept: int = KEPT,
    ):
        self._encode = encode
        self._kept = kept
        self._origins: dict[str, dict[str, object]] = {name: {} for name in names}
        self._ready: OrderedDict[str, Splits] = OrderedDict()
        # clients are measured in several threads, and a tokenizer serves one at a time
        self._lock = Lock()
        for name in islice(self._origins, kept):
            self[name]

    @property
    def ready(self) -> Mapping[str, Splits]:
        """Those that are encoded now."""
        return self._ready

    def __getitem__(self, name: str) -> Splits:
        with self._lock:
            if name not in self._ready:
                self._ready[name] = self._encoded(name)
            self._ready.move_to_end(name)
            if len(self._ready) > self._kept:
                self._ready.popitem(last=False)
            return self._ready[name]

    def _encoded(self, name: str) -> Splits:
        origins = self._origins[name]
        found: dict[str, Sequence[Example]] = {}
        for split, examples in self._encode(name).items():
            origin = origins.setdefault(split, object())
            found[split] = Rows(examples, origin)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._origins

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)
