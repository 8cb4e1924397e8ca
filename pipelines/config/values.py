"""Read values as the types of their keys say: a text stays as it was written, all else is YAML 1.2.

In YAML a name may be a number, a path may end at a ` #`, and a pattern may be an alias. Of a key whose type is a text
(`str`, also with `None`), a choice (`Literal`) or a list of these, nothing of the kind is made.
"""

import re
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

UNSET = ("", "~", "null", "none")  # of an optional key that is no free text: it has no value


def section_of(annotation: object) -> type[BaseModel] | None:
    """Return Sgar of `Sgar | None`; None for the type of a key that is no section."""
    sections = (o for o in _options(annotation) if isinstance(o, type) and issubclass(o, BaseModel))
    return next(sections, None)


def annotation_of(model: type[BaseModel], path: list[str]) -> object:
    """Return the type of the key at a path below a model; Any where the model does not say."""
    annotation: object = model
    for part in path:
        section = section_of(annotation)
        field = section.model_fields.get(part) if section else None
        annotation = field.annotation if field else Any
    return annotation


def read_value(text: str, annotation: object) -> Any:
    """Return the value of a key, of which a text was typed on the command line.

    Args:
        text: What was typed. Nothing takes the value of an optional key away.
        annotation: The key's type. A list of texts is written [a, b c]; a single item needs no brackets, and one with
            a comma quotes.

    Raises:
        ValueError: It is not YAML, for a key that is no text; or nothing was typed for a key that is not optional.
    """
    if not text and _is_text(annotation) and not _is_optional(annotation):
        raise ValueError("no value is given, and a text is needed")
    if (item := _item_of_texts(annotation)) is not None:
        return _split_texts(text, item) if text or not _is_optional(annotation) else None
    if str in _options(annotation) and _is_text(annotation):
        return text or None
    words = [word for option in _options(annotation) if get_origin(option) is Literal for word in get_args(option)]
    if _is_optional(annotation) and text in UNSET and text not in words:
        return None
    if _is_text(annotation):  # a choice of words
        is_quoted = len(text) > 1 and text[0] in ("'", '"') and text[-1] == text[0]
        return text[1:-1] if is_quoted else text
    return _construct(text, annotation)


def read_tree(text: str, model: type[BaseModel]) -> Any:
    """Return what a YAML file says of the keys of a model, nested; dots in a key make levels, too.

    Raises:
        ValueError: It is not YAML, or has a key twice.
    """
    return _construct(text, model)


def read_yaml(text: str) -> Any:
    """Return the value of a text in YAML 1.2, of any type.

    Raises:
        ValueError: It is not YAML.
    """
    return _construct(text, Any)


def write_yaml(tree: dict[str, Any]) -> str:
    """Return a tree as YAML, from which any reader of YAML takes each text for a text."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value at a path in a tree, in which levels are made as needed.

    Raises:
        ValueError: A part of the path has a value where a level is needed.
    """
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{part} has a value of its own already")
    tree[path[-1]] = value


class _Yaml12(yaml.SafeLoader):
    """YAML 1.2 scalars: 1:3 is no sexagesimal number, 1e-4 is a float, yes and no are words."""

    def construct_key(self, node: yaml.Node, annotation: object) -> Any:
        """Return the value of a key by its type."""
        is_null = node.tag == "tag:yaml.org,2002:null"
        if (section := section_of(annotation)) and isinstance(node, yaml.MappingNode):
            return self._construct_section(node, section)
        if (item := _item_of_texts(annotation)) is not None:
            if isinstance(node, yaml.SequenceNode):
                return [self.construct_key(part, item) for part in node.value]
            if isinstance(node, yaml.ScalarNode) and not is_null:
                return [node.value]
        if _is_text(annotation) and isinstance(node, yaml.ScalarNode):
            return None if is_null and _is_optional(annotation) else node.value
        return self.construct_object(node, deep=True)

    def _construct_section(self, node: yaml.MappingNode, section: type[BaseModel]) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        seen = set[str]()
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(self.construct_object(key_node))
            path = key.split(".")
            annotation = annotation_of(section, path)
            value = self.construct_key(value_node, annotation)
            is_level = section_of(annotation) is not None and isinstance(value, dict)
            for below, leaf in value.items() if is_level else [("", value)]:
                whole = f"{key}.{below}" if below else key
                if whole in seen:
                    raise ValueError(f"line {key_node.start_mark.line + 1}: {whole} is there twice")
                seen.add(whole)
                assign(tree, whole.split("."), leaf)
        return tree


_Yaml12.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes also what YAML 1.2, but not 1.1, takes for a number."""


for _tag, _pattern, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("null", r"~|null|", ("~", "n", "")),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.nan", "-+.0123456789"),
):
    for _class in (_Yaml12, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct(text: str, annotation: object) -> Any:
    """Return the value of a YAML text by its key's type."""
    loader = _Yaml12(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_key(node, annotation)
    except yaml.MarkedYAMLError as error:
        problem, mark = error.problem or error.context, error.problem_mark
        if mark is None or "\n" not in text:
            raise ValueError(f"not YAML: {problem}") from None
        raise ValueError(
            f"line {mark.line + 1}: not YAML: {problem}; a text with such characters needs quotes"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {str(error).splitlines()[0]}") from None
    finally:
        loader.dispose()


def _options(annotation: object) -> list[object]:
    """Return the types that a key may have, without what is said of them beside: [int, str] of a union of these."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (list, dict, tuple, Literal) or not get_args(annotation):
        return [annotation]
    return [option for part in get_args(annotation) for option in _options(part)]


def _is_optional(annotation: object) -> bool:
    return type(None) in _options(annotation)


def _is_text(annotation: object) -> bool:
    """Return whether a key is a text or a choice of words, and can be nothing else."""
    options = [option for option in _options(annotation) if option is not type(None)]
    return bool(options) and all(
        option is str or (get_origin(option) is Literal and all(isinstance(word, str) for word in get_args(option)))
        for option in options
    )


def _item_of_texts(annotation: object) -> object | None:
    """Return the type of an item, of a key that is a list of texts; None for other keys."""
    options = [option for option in _options(annotation) if option is not type(None)]
    if len(options) == 1 and get_origin(options[0]) is list and _is_text(get_args(options[0])[0]):
        item: object = get_args(options[0])[0]
        return item
    return None


def _split_texts(text: str, item: object) -> list[str]:
    """Return the items of [a, b c]; a text without brackets is one item, or several of a choice of words."""
    is_list = text.startswith("[") and text.endswith("]")
    if not is_list and str in _options(item):
        return [text] if text else []
    inner = text[1:-1] if is_list else text
    # An item is in quotes, or goes on to the next comma.
    parts = re.findall(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,]*?)\s*(?:,|$)""", inner)
    parts = parts[:-1] if parts and parts[-1] == "" else parts  # behind the last comma, or the end
    return [str(read_yaml(part)) if part[:1] in ("'", '"') and part[-1:] == part[0] else part for part in parts]
