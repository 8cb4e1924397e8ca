"""A text is a text: of a key that is one, what was typed or written is the value, whatever YAML would make of it."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_experiment_name, _validate_model_name
from pydantic import AfterValidator, BaseModel

from pipelines.config.recipe import (
    NAMES_ELSEWHERE,
    load_recipe,
    nearest_key,
    parse_config,
    parse_stored_config,
    read_stored_config,
    to_yaml,
    with_values,
)
from pipelines.config.schema import Config
from pipelines.config.values import annotation_of, read_tree, read_value, write_yaml

FOLDER = ("data.name=folder", "data.root=x")

# What YAML, of one version or another, takes for something else than the text.
TEXTS = ["2024", "0001", "007", "1e5", "1_000", "1:30", "0x1F", "3.0", "yes", "no", "On", "true", "null", "~", "~/x"]
TEXTS += ["2024-01-01", "My pics #2", "# x", "a: b", "*x", "&x", "!x", "[a", "[a]", "{a}", "{a: 1}", "@x", "%x", "`x"]
TEXTS += [
    "'q'",
    '"q"',
    '"q',
    "- a",
    "a\\b",
    "C:\\new",
    " a ",
    "?",
    "|",
    ">",
    "<<",
    "=",
    "é",
    ".inf",
    "a,b",
    "^(\\d{4})_#",
]


class Sketch(BaseModel):
    """Types of keys that are texts, by whatever way they are one."""

    text: str = ""
    optional: str | None = None
    checked: Annotated[str, AfterValidator(str)] | None = None
    choice: Literal["none", "true", "2024"] = "none"
    optional_choice: Literal["a", "b"] | None = None
    texts: list[str] = []
    choices: list[Literal["a", "b"]] | None = None
    number_or_text: int | str = 0
    number: float | None = None


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["text", "optional", "checked"])
def test_a_text_is_what_was_typed(key: str, text: str) -> None:
    assert read_value(text, annotation_of(Sketch, [key])) == text


@pytest.mark.parametrize(
    "text", [text for text in TEXTS if not re.match(r"[\"'\s?|>#@%`&!*{<-]|\[a|a: b|null|~$|My", text)]
)
def test_a_plain_scalar_of_a_file_is_its_source(text: str) -> None:
    for key in ("text", "optional", "checked"):
        assert read_tree(f"{key}: {text}\n", Sketch)[key] == text
    if not re.search(r"[\[\],{}]", text):
        assert read_tree(f"texts: [{text}, {text}]\n", Sketch)["texts"] == [text, text]
    assert read_tree(f"texts: {text}\n", Sketch)["texts"] == [text]


def test_nothing_takes_an_optional_value_away() -> None:
    for key in ("optional", "checked", "optional_choice", "choices", "number"):
        assert read_value("", annotation_of(Sketch, [key])) is None
    for word in ("null", "~", "none"):
        assert read_value(word, annotation_of(Sketch, ["number"])) is None
        assert read_value(word, annotation_of(Sketch, ["optional_choice"])) is None
        assert read_value(word, annotation_of(Sketch, ["choice"])) == word
    for file in ("optional:", "optional: null", "optional: ~"):
        assert read_tree(file, Sketch) == {"optional": None}
    assert read_tree("optional: 'null'\ntext: null", Sketch) == {"optional": "null", "text": "null"}
    with pytest.raises(ValueError, match="storage=: no value is given"):
        load_recipe("glyphs", ["storage="])


@pytest.mark.parametrize(
    ("typed", "items"),
    [
        ("[0001,0002]", ["0001", "0002"]),
        ("[a, b c]", ["a", "b c"]),
        ("word", ["word"]),
        ("two words", ["two words"]),
        ("*_mask*", ["*_mask*"]),
        ("[*_mask*, [ab]*.png]", ["*_mask*", "[ab]*.png"]),
        ('["Smith, John", b]', ["Smith, John", "b"]),
        ("['it''s', a\"b]", ["it's", 'a"b']),
        ("[null, yes, 1e5, #2, a: b]", ["null", "yes", "1e5", "#2", "a: b"]),
        ("a,b", ["a,b"]),
        ("[]", []),
        ("", []),
    ],
)
def test_lists_of_texts(typed: str, items: list[str]) -> None:
    assert read_value(typed, annotation_of(Sketch, ["texts"])) == items


def test_lists_of_choices() -> None:
    for typed in ("[a,b]", "a,b", "a, b", '["a", "b"]'):
        assert read_value(typed, annotation_of(Sketch, ["choices"])) == ["a", "b"]
    assert load_recipe("glyphs", ["method=iaa,sgar"]).method == ["iaa", "sgar"]
    assert load_recipe("glyphs", ["method=namr"]).method == ["namr"]


def test_other_values_are_yaml() -> None:
    number_or_text = annotation_of(Sketch, ["number_or_text"])
    assert (read_value("2", number_or_text), read_value("1:3", number_or_text)) == (2, "1:3")
    assert read_value("1e-4", annotation_of(Sketch, ["number"])) == 1e-4
    assert load_recipe("glyphs", ["loss.base=0.2"]).loss.arguments == {"base": 0.2}
    with pytest.raises(ValueError, match=r"optimizer\.milestones=\[1: not YAML: expected ',' or '\]'"):
        load_recipe("glyphs", ["optimizer.milestones=[1"])


KEYS = ["storage", "data.root", "backbone.weights", "loss.name"]


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_text_is_kept_by_what_is_stored(text: str) -> None:
    values = {"data.name": "folder", "data.root": text, "storage": text, "data.test_classes": [text, "0001", "1e5"]}
    config = with_values(Config(), values)
    assert read_stored_config(to_yaml(config)) == config
    assert parse_stored_config(json.loads(json.dumps(config.to_dict()))) == config


def test_recipes_keep_texts(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: 2024\nmodel_name: 7\nmethod: iaa\n"
        "data:\n  name: folder\n  root: 1e5\n  test_classes:\n    - 0001\n    - 2024-01-01\n    - no\n",
        encoding="utf-8",
    )
    config = load_recipe(str(file))
    assert (config.name, config.model_name, config.method, config.data.root) == ("2024", "7", ["iaa"], "1e5")
    assert config.data.test_classes == ["0001", "2024-01-01", "no"]
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_recipe(str(file)) == config
    assert read_tree("name: 2024", Config)["name"] == "2024" and "'1e5'" in write_yaml({"a": "1e5"})


def test_python_values_may_be_paths_and_numbers(tmp_path: Path) -> None:
    values: dict[str, Any] = {"name": 2024, "data.name": "folder", "data.root": tmp_path, "data.test_classes": [1, 2]}
    config = load_recipe("glyphs", values)
    assert (config.name, config.data.root, config.data.test_classes) == ("2024", str(tmp_path), ["1", "2"])
    assert load_recipe("glyphs", {"data": {"name": "folder", "root": tmp_path}}).data.root == str(tmp_path)
    with pytest.raises(ValueError, match="name=true: "):
        load_recipe("glyphs", {"name": True})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nseed: 1\nepochs: 4\n", r"mine\.yaml: line 3: epochs is there twice"),
        ("data: {root: a}\ndata.root: b\n", r"mine\.yaml: line 2: data\.root is there twice"),
        ("epochs: 3\nname: @x\n", r"mine\.yaml: line 2: not YAML: .*'@'.*; a text with such characters needs quotes"),
        ("data:\n  root: a: b\n", r"mine\.yaml: line 2: not YAML: .*needs quotes"),
        ("[1, 2]\n", r"mine\.yaml: not a mapping of keys"),
        ("extends: glyhps\n", r"mine\.yaml: it extends glyhps, which is not there; did you mean glyphs\?"),
        ("epochs: 3\ndata: 4\n", r"data=4: data has keys of its own: data\.name=4"),
    ],
)
def test_a_recipe_that_is_refused_is_named_with_the_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(refusal.value)


def test_a_recipe_may_have_dotted_keys_and_extend_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: glyphs\nbatch.images: 2\nbatch: {classes: 8}\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).batch.size == 16
    (tmp_path / "mine.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.yaml: not a text in UTF-8"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "name", ["..", ".", "-x", ".x", "a/b", "a\\b", "a b", " a", "a ", "a\n", "a\0", "a" * 201, "a:b"]
)
def test_names_that_are_no_folders_name_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^name=.*letters, digits, _ \. and - are allowed.*for instance \w"
    ) as refusal:
        load_recipe("glyphs", {"name": name})
    assert str(refusal.value).isprintable()
    assert load_recipe("glyphs", {"name": str(refusal.value).rpartition("for instance ")[2]}).name


@pytest.mark.parametrize(
    "name", ["team/shoes", "a:b", ".", "..", "a@b", "a#b", "a?b", "a%b", " a", "a ", "a\nb", "/a", "x" * 251]
)
def test_model_names_that_mlflow_refuses_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^model_name=.*for instance \w"):
        load_recipe("glyphs", {"model_name": name})


@given(st.text(min_size=1, max_size=20))
def test_mlflow_takes_the_names_that_are_taken(name: str) -> None:
    for key, validate in (("model_name", _validate_model_name), ("experiment", _validate_experiment_name)):
        try:
            parse_config({key: name})
        except ValueError:
            continue
        try:
            validate(name)
        except MlflowException as error:
            pytest.fail(f"{key}={name!r}: {error}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optimizer.lr"),
        ("batch_size", "batch.classes and batch.images"),
        ("root", "data.root"),
        ("dataset", "data.name"),
        ("data.workers", "workers"),
        ("optimiser.lr", "optimizer.lr"),
        ("optim.weight_deca", "optimizer.weight_decay"),
        ("experment", "experiment"),
        ("batch.size", "batch.classes"),
        ("num_workers", "workers"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown key {key}; did you mean {meant}"):
        load_recipe("glyphs", [f"{key}=1"])


def test_no_nonsense_is_proposed() -> None:
    assert "allowed: optimizer.name, optimizer.lr" in nearest_key("optimizer.foo")
    assert "`dml config` prints" in nearest_key("foo") and "`dml config` prints" in nearest_key("foo.bar")


def test_names_of_other_programs_lead_to_keys_that_exist() -> None:
    for hint in NAMES_ELSEWHERE.values():
        key = re.split(r"[ ,]", hint)[0]
        assert annotation_of(Config, key.split(".")) is not Any or key.startswith("loss."), hint


@pytest.mark.parametrize("assignment", ["loss=triplet", "backbone=resnet50", "optimizer=sgd", "data=cub"])
def test_a_section_alone_names_its_key(assignment: str) -> None:
    section, value = assignment.split("=")
    with pytest.raises(ValueError, match=rf"{section} has keys of its own: {section}\.name={value}"):
        load_recipe("glyphs", [assignment])
