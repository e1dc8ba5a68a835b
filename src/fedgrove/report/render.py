"""Pages that need nothing else: the templates of ``page/`` with their one style sheet."""

from __future__ import annotations

from importlib import resources
from typing import Any


def render(template: str, package: str = "fedgrove.report", **content: Any) -> str:
    """A page from ``PACKAGE/page/TEMPLATE``; it may extend and import those of the report."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    packages = dict.fromkeys([package, "fedgrove.report"])
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "page") for name in packages]),
        autoescape=True,  # client names, labels and the job come from users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("fedgrove.report").joinpath("page/style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(css=css, **content)
