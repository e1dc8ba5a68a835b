"""The report of a run: one self-contained HTML file and PNGs, from the files of the run directory
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_report(run_dir: Path, baselines: Sequence[Path] = ()) -> Path:
    """See ``fedgrove.report.build.write_report``; matplotlib and jinja2 are imported on the first
    call.
    """
    from fedgrove.report.build import write_report as write

    return write(run_dir, baselines)
