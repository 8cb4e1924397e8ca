"""What the site has beside the pages of this folder; a hook of MkDocs.

README, CONTRIBUTING and CHANGELOG are pages of it. The references of the config and of the command line are made from
the models and the commands. A link to any other file of the repository leads to a page that shows it.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from dml_core import base_losses
from pipelines.cli import main
from pipelines.config.identity import FREE_KEYS
from pipelines.config.schema import Config

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^\s()#:]+)(#[^\s()]+)?(?=\))")
ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="((?:https?:)?//[^"]*)')
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".toml": "toml"}

log = get_plugin_logger("generated")


class Key(NamedTuple):
    """Of a config. allowed, default: in words."""

    name: str
    allowed: str
    default: str
    text: str


class Group(NamedTuple):
    """Keys side by side in a config; of the whole (name "") those at its top."""

    name: str
    text: str
    keys: list[Key]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, content in (("config.md", config_reference()), ("cli.md", command_reference())):
        files.append(File.generated(config, page, content=content))
    origins = {_origin(file.src_uri): file.content_string for file in files.documentation_pages()}
    linked = {page for origin, text in origins.items() for _, page in _links(text, origin)}
    for page in sorted(page for page in linked if page and page.startswith("source/")):
        path = page.removeprefix("source/").removesuffix(".md")
        files.append(File.generated(config, page, content=shown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    pages = dict(_links(markdown, _origin(here)))

    def moved(match: re.Match[str]) -> str:
        target = pages[match[1]]
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (match[2] or "") if target else match[0]

    # In a table GitHub wants `a\|b`, of which Python-Markdown would show the backslash.
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\|", "|"), LINK.sub(moved, markdown))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    for address in ELSEWHERE.findall(output):
        log.warning("%s would ask another machine for %s", page.file.src_uri, address)
    return output


def _origin(page: str) -> str:
    """Where the repository has a page's text."""
    return {page: source for source, page in TOP.items()}.get(page, f"docs/{page}")


def _links(text: str, origin: str) -> Iterator[tuple[str, str | None]]:
    """Links as written, and the page of the site that is meant; None: as it is, for MkDocs to check."""
    for link, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
        if path in TOP:
            yield link, TOP[path]
        elif path.startswith("docs/"):
            yield link, path.removeprefix("docs/")
        else:
            yield link, f"source/{path}.md" if (ROOT / path).is_file() else None


def shown(path: str) -> str:
    """A page with a file of the repository."""
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    code = f'~~~~{language} linenums="1"\n{(ROOT / path).read_text()}~~~~\n'
    return f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n{code}"


def command_reference() -> str:
    """By typer, as `dml --help` has it; examples as code."""
    command = typer.main.get_command(main.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="dml", title="Commands")
    return re.sub(r"(?m)\s*(?:Example|Then): (dml .+)$", r"\n\n```\n\1\n```\n", text)


def groups() -> Iterator[Group]:
    """Of the config, from the models' own descriptions."""
    schema = Config.model_json_schema()
    sections, top = {}, []
    for name, about in schema["properties"].items():
        if reference := next((p["$ref"] for p in [about, *about.get("anyOf", [])] if "$ref" in p), None):
            sections[name] = schema["$defs"][reference.rpartition("/")[2]]
        else:
            top.append(_key(name, about))
    yield Group("", schema["description"], top)
    for name, section in sections.items():
        keys = [_key(f"{name}.{key}", about) for key, about in section["properties"].items()]
        yield Group(name, section.get("description", ""), keys)


def _key(name: str, about: dict[str, Any]) -> Key:
    default = about.get("default")
    told = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return Key(name, allowed(about), told, about.get("description", ""))


def allowed(about: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in about:
        return " or ".join("none" if part.get("type") == "null" else allowed(part) for part in about["anyOf"])
    if "enum" in about:
        return ", ".join(map(str, about["enum"]))
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    told = " and ".join(f"{word} {about[bound]:g}" for bound, word in bounds.items() if bound in about)
    kind = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}
    if about["type"] == "array":
        return f"list of: {allowed(about['items'])}"
    if about["type"] == "object":
        return "mapping"
    if "pattern" in about:
        told = f"like `{about['pattern']}`"
    return f"{kind[about['type']]} {told}".rstrip()


def config_reference() -> str:
    lines = ["# Config keys\n"]
    lines += [
        "Every key that `dml train`, `tune` and `config` take as `KEY=VALUE`, and a recipe as YAML. A recipe's own"
    ]
    lines += ["defaults stand above those given here: `dml config RECIPE` prints what a run has.\n"]
    for group in groups():
        lines += [f"## {group.name or 'The run'}\n", f"{group.text}\n"]
        for key in group.keys:
            may = "; may differ when a run is [continued](resume.md#what-may-change)" if key.name in FREE_KEYS else ""
            lines += [f"### `{key.name}`\n", f"{key.text}\n", f"{key.allowed}; default: **{key.default}**{may}\n"]
        if group.name == "loss":
            lines += ["### `loss.ARGUMENT`\n", "Whatever the loss takes, with the default that it has here:\n"]
            for name in (*base_losses.SHORT, *base_losses.LOSSES):
                given = ", ".join(f"{key}={value}" for key, value in base_losses.arguments(name).items())
                lines += [f"- **{name}**: `{given}`"]
            lines += [""]
    return "\n".join(lines)
