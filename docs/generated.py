"""Add pages to the documentation site that are not in this folder; a hook of MkDocs.

README, CONTRIBUTING and CHANGELOG become pages. The references of the config and of the command line are made from the
models and the commands. A link to any other file of the repository leads to a page that shows the file.
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
from pipelines.config.methods import METHODS
from pipelines.config.schema import Config

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^\s()#:]+)(#[^\s()]+)?(?=\))")
ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="((?:https?:)?//[^"]*)')
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".toml": "toml"}

log = get_plugin_logger("generated")


class Key(NamedTuple):
    """A key of the config, with its allowed values, its default and its description as texts."""

    name: str
    allowed: str
    default: str
    text: str


class Group(NamedTuple):
    """The keys of a section of the config; name "" is for those at its top."""

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
        files.append(File.generated(config, page, content=source_page(path)))
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
    """Return the file of the repository that a page is made from."""
    return {page: source for source, page in TOP.items()}.get(page, f"docs/{page}")


def _links(text: str, origin: str) -> Iterator[tuple[str, str | None]]:
    """Yield the links of a text, and the page of the site that each leads to; None leaves it to MkDocs."""
    for link, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
        if path in TOP:
            yield link, TOP[path]
        elif path.startswith("docs/"):
            yield link, path.removeprefix("docs/")
        else:
            yield link, f"source/{path}.md" if (ROOT / path).is_file() else None


def source_page(path: str) -> str:
    """Return a page that shows a file of the repository."""
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    code = f'~~~~{language} linenums="1"\n{(ROOT / path).read_text()}~~~~\n'
    return f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n{code}"


def command_reference() -> str:
    """Return the page of all commands, as `dml --help` describes them, with examples as code."""
    command = typer.main.get_command(main.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="dml", title="Commands")
    return re.sub(r"(?m)\s*(?:Example|Then): (dml .+)$", r"\n\n```\n\1\n```\n", text)


def groups() -> Iterator[Group]:
    """Yield the groups of keys, as the models describe them; the methods last."""
    schema = Config.model_json_schema()
    sections, top = {}, []
    for name, about in schema["properties"].items():
        if reference := next((p["$ref"] for p in [about, *about.get("anyOf", [])] if "$ref" in p), None):
            sections[name] = schema["$defs"][reference.rpartition("/")[2]]
        else:
            top.append(_key(name, about))
    yield Group("", schema["description"], top)
    for name in sorted(sections, key=METHODS.__contains__):
        section = sections[name]
        keys = [_key(f"{name}.{key}", about) for key, about in section["properties"].items()]
        yield Group(name, section.get("description", ""), keys)


def _key(name: str, about: dict[str, Any]) -> Key:
    default = about.get("default")
    text = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return Key(name, allowed_values(about), text, about.get("description", ""))


def allowed_values(about: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows."""
    if "anyOf" in about:
        return " or ".join("none" if part.get("type") == "null" else allowed_values(part) for part in about["anyOf"])
    if "enum" in about:
        return ", ".join(map(str, about["enum"]))
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = " and ".join(f"{word} {about[bound]:g}" for bound, word in bounds.items() if bound in about)
    types = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}
    if about["type"] == "array":
        return f"list of: {allowed_values(about['items'])}"
    if about["type"] == "object":
        return "mapping"
    if "pattern" in about:
        limits = f"like `{about['pattern']}`"
    return f"{types[about['type']]} {limits}".rstrip()


def config_reference() -> str:
    """Return the page of all config keys."""
    lines = ["# Config keys\n"]
    lines += [
        "These are all keys that `dml train`, `dml tune` and `dml config` take as `KEY=VALUE`. A recipe sets them",
        "in YAML. Where a recipe sets a key, its value takes the place of the default given here. `dml config RECIPE`",
        "prints the values that a run has.\n",
        '**A text is taken as it is typed:** `name=2024`, `data.root="My pics #2"` and `data.root=null` are texts. A',
        "list of texts is `[a, b c]`, or a single text without brackets; an item with a comma is put in quotes, as in",
        "`'data.test_classes=[\"Smith, John\", b]'`. Values of other keys are in YAML 1.2. Nothing (`data.root=`)",
        "takes a value away; for keys that are no texts `none` and `null` do, too. In a recipe, quote a text",
        "in which YAML would see a comment or a mapping (` #`, `: `).\n",
    ]
    for group in groups():
        lines += [f"## {group.name or 'The run'}\n", f"{group.text}\n"]
        for key in group.keys:
            may_change = key.name in {*FREE_KEYS} - {"name", "storage", "experiment"}  # which tell what run it is
            may = "; may change when a run is [continued](resume.md#what-may-change)" if may_change else ""
            lines += [f"### `{key.name}`\n", f"{key.text}\n", f"{key.allowed}; default: **{key.default}**{may}\n"]
        if group.name == "loss":
            lines += ["### `loss.ARGUMENT`\n", "Whatever the loss takes, with the default that it has here:\n"]
            for name in (*base_losses.SHORT_NAMES, *base_losses.LOSSES):
                given = ", ".join(f"{key}={value}" for key, value in base_losses.default_arguments(name).items())
                lines += [f"- **{name}**: `{given}`"]
            lines += [""]
    return "\n".join(lines)
