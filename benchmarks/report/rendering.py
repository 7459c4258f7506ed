"""Pages from the Jinja2 templates in this folder."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from benchmarks.report.tables import limit_text, measured_text, numeric_columns, verdict
from benchmarks.results import number


def render(template: str, **values: Any) -> str:
    """Fill in a template. The values in .html files are escaped.

    Raises:
        UndefinedError: If the template uses a name that is not among ``values``.
    """
    return _environment.get_template(template).render(values)


def _wrap(text: str) -> str:
    return textwrap.fill(text.strip(), 120, break_long_words=False, break_on_hyphens=False)


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters.update(
    limit=limit_text,
    measured=measured_text,
    number=number,
    numeric_columns=numeric_columns,
    verdict=verdict,
    wrap=_wrap,
)
