"""Fill the HTML templates."""

from functools import cache
from typing import Any

import jinja2


def render(template: str, **known: Any) -> str:
    return _environment().get_template(template).render(known)


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("pipelines.pages", "")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
