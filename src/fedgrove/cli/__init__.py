"""The command line: parse, call, print. Everything heavy is imported inside the commands, so that
help is instant.
"""

from __future__ import annotations

from fedgrove.cli.entry import app, console, explain, main

__all__ = ["app", "console", "explain", "main"]
