"""What the documentation promises exists: commands with their options and keys, diffs that apply, error messages."""

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest
import typer

from pipelines.cli import main
from pipelines.config.recipe import data_section, load_recipe
from pipelines.sweeps.spaces import load_space

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DML = typer.main.get_command(main.app)
ASSIGNMENT = re.compile(r"[a-z][\w.]*=")

specification = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
assert specification and specification.loader
generated = importlib.util.module_from_spec(specification)
specification.loader.exec_module(generated)
KEYS = {key.name for group in generated.groups() for key in group.keys}


def fenced(text: str, *languages: str) -> list[str]:
    return [code for language, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text) if language in languages]


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the command lines of a page, and whether they are whole: one in a sentence need not be."""
    for code in fenced(text, "", "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            begins = r"(?:^|&& |; )(?:[A-Z_]+=\S+ )*((?:dml|make|python) .*)"
            if command := re.search(begins, line.partition(" #")[0]):
                yield command[1], True
    for line in re.findall(r"`((?:dml|make|python) [^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", text)):
        yield line.replace("\\|", "|"), False


def check(words: list[str], whole: bool = True) -> None:
    """Parse a command of dml, as far as it goes before it looks at disks, clusters and servers."""
    command, names = DML, list[str]()
    while hasattr(command, "commands") and words:
        command, names, words = command.commands[words[0]], [*names, words[0]], words[1:]
    name = " ".join(names)
    if not whole or any(word.startswith("[") or word in ("|", "...") for word in words):
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.strip("[]") for word in words if word.strip("[").startswith("-")}
        assert used <= options | {"--help", "--"}, f"dml {name}: {used - options}"
        check_keys(name, words)
        return
    parameters = command.make_context(name, list(words)).params
    if name == "submit" and parameters["arguments"][0] not in ("list", "logs", "stop"):
        check(parameters["arguments"])
    elif name in ("train", "tune", "config"):
        recipes = [word for word in parameters["arguments"] or [] if "=" not in word]
        # One of the reader's own, or what stands for one, has the keys of any.
        recipes = ["glyphs" if name.endswith(".yaml") or name.isupper() else name for name in recipes]
        config = load_recipe(*recipes or ["glyphs"], [word for word in parameters["arguments"] or [] if "=" in word])
        if name == "tune" and parameters["space"] and not parameters["space"].endswith(".py"):
            load_space(parameters["space"], config)
    elif name == "data check":
        data_section(parameters["name"], parameters["assignments"])
    else:
        check_keys(name, words)


def check_keys(name: str, words: list[str]) -> None:
    for word in filter(ASSIGNMENT.match, words):
        key = word.partition("=")[0]
        known = key in KEYS or key.startswith(("loss.", "changes.")) or (name == "data check" and f"data.{key}" in KEYS)
        assert known, f"dml {name}: there is no key {key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for line, whole in commands(page.read_text()):
        tool, *words = shlex.split(line)
        if tool == "dml":
            check(words, whole)
        elif tool == "make":
            assert {word for word in words if "=" not in word} <= targets, line
        elif words[0].endswith(".py"):
            assert (ROOT / words[0]).is_file(), line
    for code in fenced(page.read_text(), "python"):
        ast.parse(code)


def examples(command: Any = DML) -> Iterator[str]:
    yield from re.findall(r"Example: dml (.+)", command.help or "")
    for sub_command in getattr(command, "commands", {}).values():
        yield from examples(sub_command)


def test_examples_of_the_help() -> None:
    lines = list(examples())
    assert len(lines) > 12
    for line in lines:
        check(shlex.split(line))


@pytest.mark.parametrize(
    "line",
    [
        *(
            "train glyphs epochz=2",
            "train glyhps",
            "trian",
            "train --jsn",
            "tune glyphs --space sgra",
            "index search X -j 3",
        ),
        *("submit -- train loss.nam=x", "data check folder rot=x", "evaluate RUN worker=2", "embed RUN"),
    ],
)
def test_what_is_misspelt_fails(line: str) -> None:
    with pytest.raises(Exception, match=r"."):
        check(shlex.split(line))


def test_every_key_and_section_is_described() -> None:
    groups = list(generated.groups())
    assert {"", "data", "batch", "backbone", "loss", "optimizer", "iaa", "sgar", "namr"} == {g.name for g in groups}
    assert [key.name for group in groups for key in group.keys if not key.text] == []
    assert [group.name for group in groups if not group.text] == []
    reference = generated.config_reference()
    assert all(f"### `{key}`" in reference for key in KEYS)
    assert "whole number at least 1; default: **20**" in reference and "diag, full; default: **diag**" in reference


def templates(path: Path) -> Iterator[str]:
    """Yield the texts in a file, with … for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_that_are_explained_are_in_the_source() -> None:
    sources = [path for package in ("dml_core", "pipelines") for path in (ROOT / package).rglob("*.py")]
    texts = "\n".join(text for path in sources for text in templates(path))
    headings = re.findall(r"(?m)^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(headings) > 40
    for heading in headings:
        pattern = "[^\n]*".join(map(re.escape, heading.strip("…").split("…")))
        assert re.search(pattern, texts), heading


def test_calls_of_the_python_page_exist() -> None:
    calls = re.findall(r"`(\w+(?:\.\w+)+)\(", (ROOT / "docs" / "python.md").read_text())
    assert len(calls) > 4
    for call in calls:
        module, _, name = call.removeprefix("pipelines.").rpartition(".")
        package = "" if module.startswith("dml_core") else "pipelines."
        assert hasattr(importlib.import_module(f"{package}{module}"), name), call


def test_picture_of_the_tree_is_what_its_script_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_tree.py"))["draw"]
    assert (ROOT / "docs" / "tree.svg").read_text() == draw()


def test_notebook_is_the_page() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_notebook.py"))["draw"]
    assert (ROOT / "docs" / "python.ipynb").read_text() == draw()


def test_formulas_of_the_scaling_page_are_what_the_script_prints() -> None:
    command = [sys.executable, "benchmarks/scaling.py", "--formulas"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert printed and all(table.strip() in page for table in printed.split("\n\n"))


def test_diffs_of_extending_apply_and_run(tmp_path: Path) -> None:
    pages = sorted((ROOT / "docs" / "extending").glob("*.md"))
    for folder in ("dml_core", "pipelines", "tune_spaces", "tests", "docs"):
        copytree(ROOT / folder, tmp_path / folder, ignore=ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    git = ["git", "-C", str(tmp_path), "apply"]
    diffs = ["".join(fenced(page.read_text(), "diff")) for page in pages]
    for diff in diffs:  # each alone, then all of them
        subprocess.run([*git, "--check"], input=diff, text=True, check=True)
    for diff in diffs:
        subprocess.run(git, input=diff, text=True, check=True)
    lines = [line for page in pages for line, whole in commands(page.read_text()) if whole]
    tests = [word for line in lines for word in shlex.split(line.removeprefix("python -m pytest "))]
    assert len(tests) > 3
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("page", "files"), [("loss", 1), ("method", 3), ("dataset", 1), ("command", 2), ("metric", 2)])
def test_files_that_an_addition_touches(page: str, files: int) -> None:
    """Tests are not counted."""
    (diff,) = fenced((ROOT / "docs" / "extending" / f"{page}.md").read_text(), "diff")
    touched = re.findall(r"(?m)^\+\+\+ b/(?!tests/)(.+)$", diff)
    assert 0 < len(touched) <= files, touched
