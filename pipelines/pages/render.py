"""Fill the HTML templates."""

from datetime import datetime
from functools import cache

import jinja2


def render(template: str, **values: object) -> str:
    """Fill a template of this folder. A name that it uses and that is not given is an error."""
    return _environment().get_template(template).render(values)


def made_by(command: str) -> str:
    """Write the last line of a page: the command that made it, and when."""
    return f"Made by {command}, {datetime.now():%Y-%m-%d %H:%M}."


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("pipelines.pages", "")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
