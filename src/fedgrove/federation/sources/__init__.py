"""Where the rows come from: see ``fedgrove.federation.sources.base``.

Whatever a source calls its columns, a row here has the names that the task gives it: see
``Task.row``.
"""

from __future__ import annotations

from fedgrove.federation.sources.base import Clients, Origin, Rows, Source
from fedgrove.ground.registry import Registry

__all__ = [
    "GROUP",
    "SOURCES",
    "Clients",
    "Origin",
    "Rows",
    "Source",
    "register",
]

GROUP = "fedgrove.sources"
#: by the values of ``data.source``
SOURCES: Registry[Source] = Registry(
    "source",
    "data.source",
    GROUP,
    "fedgrove.federation.sources",
    lambda: Source,
)
register = SOURCES.register
