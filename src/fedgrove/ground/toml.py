"""One value as TOML: how files are written, and how messages show what somebody wrote."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def value_text(value: Any) -> str:
    """One value on one line, as TOML (``None``, which TOML lacks, as ``not set``)."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        if value:
            return "true"
        return "false"
    if isinstance(value, float):
        if math.isfinite(value):
            return repr(value)
        return str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but JSON leaves DEL as it is, which TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        inner = ", ".join(f"{key_text(key)} = {value_text(item)}" for key, item in value.items())
        if inner:
            return f"{{ {inner} }}"
        return "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value)


def key_text(key: str) -> str:
    """A key, quoted where TOML needs it."""
    if _BARE.fullmatch(key):
        return key
    return value_text(key)


def shown(value: Any) -> str:
    """A value for an error: TOML, cut where it is long."""
    return short(value_text(value))


def short(text: str, limit: int = 60) -> str:
    if len(text) <= limit:
        return text
    return text[: limit - 1] + "…"
