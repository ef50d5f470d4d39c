"""YAML files into frozen pydantic models; errors name the file, the key and the remedy."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from common.errors import ConsiliumError, did_you_mean

S = TypeVar("S", bound="Section")


# Where pydantic's own words speak of Python.
PLAIN = {
    "invalid_key": "a word as key",
    "string_type": "text (in quotes, if YAML reads it as something else)",
    "tuple_type": "a list",
    "path_type": "a path",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
}


# An impossible date is a ValueError, endless nesting a RecursionError.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice: its first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


class Section(BaseModel):
    """A block of keys in a YAML file: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class YamlFile(Section):
    """The top level of a YAML file; remembers which file it came from, to name it in errors."""

    _source: str = PrivateAttr(default="(no file)")

    @classmethod
    def load(cls, path: Path, error: type[ConsiliumError], changes: Sequence[str] = ()) -> Self:
        """Read and validate `path`, after applying `key=value` changes (dotted keys, YAML values).

        Raises:
          error: the file is missing, is not YAML, or does not fit; every problem on its own line.
        """
        content = _read(path, error)
        for change in changes:
            _apply(content, change, error)
        return cls.parse(content, str(path), error, folder=path.parent)

    @classmethod
    def parse(
        cls,
        content: object,
        source: str,
        error: type[ConsiliumError],
        folder: Path | None = None,
    ) -> Self:
        """Validate an already read mapping; `source` names it in errors.

        Only with `folder` do keys read the files they name, which are relative to it.
        """
        try:
            parsed = cls.model_validate(content, context=folder and {"folder": folder})
        except ValidationError as ex:
            lines = [_explain(cls, source, problem) for problem in _tell_apart(ex.errors())]
            raise error("\n".join(lines)) from None
        parsed._source = source
        return parsed

    def anchored(self, folder: Path) -> Self:
        """A copy whose relative paths start at `folder`, and those with `~` at home."""
        copy = _anchor(self, folder)
        copy._source = self._source
        return copy

    @property
    def source(self) -> str:
        """The file this was read from, for error messages on this machine only."""
        return self._source


def _anchor(section: S, folder: Path) -> S:
    update: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            update[name] = folder / _home(value)
        elif isinstance(value, Section):
            update[name] = _anchor(value, folder)
        elif isinstance(value, tuple):
            inside = (_anchor(one, folder) if isinstance(one, Section) else one for one in value)
            update[name] = tuple(inside)
    return section.model_copy(update=update)


def _home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: a folder of that very name
        return path


def _read(path: Path, error: type[ConsiliumError]) -> dict[str, Any]:
    try:
        content = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as ex:
        reason = getattr(ex, "strerror", None) or "not UTF-8 text"
        raise error(path, expected="a readable YAML file", got=reason) from None
    except _NOT_YAML as ex:
        raise error(path, expected="valid YAML", got=" ".join(str(ex).split())) from None
    if not isinstance(content, dict):
        got = type(content).__name__
        raise error(path, expected="a mapping of keys to values", got=got)
    return content


def _apply(content: dict[str, Any], change: str, error: type[ConsiliumError]) -> None:
    key, found, value = change.partition("=")
    if not found or not key:
        raise error("--set", expected="key=value", got=repr(change))
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        inner = place.get(parent)
        if not isinstance(inner, dict):
            inner = place[parent] = {}
        place = inner
    try:
        place[last] = _Loader(value).get_single_data()
    except _NOT_YAML:
        raise error(f"--set {key}", expected="a YAML value", got=repr(value)) from None


def alternatives(change: str, error: type[ConsiliumError]) -> list[str]:
    """One `key=value` change for each value of `key=a,b,…`.

    Values are YAML; a comma inside brackets or quotes does not part them.
    """
    key, _, text = change.partition("=")
    try:
        listed = yaml.compose(f"[{text}\n]", _Loader)
        if not isinstance(listed, yaml.SequenceNode):
            raise ValueError
    except _NOT_YAML:
        expected = "YAML values with commas between"
        raise error(f"--set {key}", expected=expected, got=repr(text)) from None
    marks = [(node.start_mark.index - 1, node.end_mark.index - 1) for node in listed.value]
    return [f"{key}={text[start:end].strip()}" for start, end in marks] or [change]


def _tell_apart(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without lists that are too short only because one of their items is wrong."""
    within = {problem["loc"][:-1] for problem in problems}
    return [p for p in problems if p["type"] != "too_short" or p["loc"] not in within]


def _explain(model: type[BaseModel], source: str, problem: ErrorDetails) -> str:
    """One validation problem as *file: key: expected, got, remedy*."""
    section, keys = _locate(model, problem["loc"])
    kind, got = problem["type"], problem["input"]
    if kind.startswith("union_tag"):
        keys = [*keys, problem["ctx"]["discriminator"].strip("'")]
        got = problem["ctx"].get("tag")
    where = f"{source}: {'.'.join(keys)}" if keys else source
    if kind == "extra_forbidden":
        hint = did_you_mean(keys[-1], section.model_fields)
        return f"{where}: expected a known key, got {keys[-1]!r}. {hint}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{where}: expected a value, got nothing. Add the key."
    if kind == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    expected = PLAIN.get(kind) or problem["msg"].removeprefix("Input should be ")
    if kind == "union_tag_invalid":
        expected = problem["ctx"]["expected_tags"]
    if kind == "too_short":
        expected = f"at least {problem['ctx']['min_length']} of them"
    if got is None:
        remedy = "Write {} for" if expected == PLAIN["model_type"] else "Remove the key for"
        return f"{where}: expected {expected}, got null. {remedy} its default."
    text, near = f"{where}: expected {expected}, got {got!r}", _near(got, problem)
    return f"{text}. {near}" if near else text


def _near(got: object, problem: ErrorDetails) -> str:
    """The nearest allowed word, where the key takes one of a few."""
    context = problem.get("ctx", {})
    words = str(context.get("expected_tags") or context.get("expected"))
    if problem["type"] not in ("literal_error", "union_tag_invalid") or not isinstance(got, str):
        return ""
    allowed = words.replace(" or ", ", ").split(", ")
    hint = did_you_mean(got, [word.strip("'") for word in allowed])
    return hint if hint.startswith("Did") else ""


def _locate(
    model: type[BaseModel], location: Sequence[int | str]
) -> tuple[type[BaseModel], list[str]]:
    """The section a problem is in, and its keys as the file has them.

    Pydantic's own location also names the chosen kind of a section, as in `data.manifest.root`.
    """
    sections, keys = [model], []
    for part in location:
        chosen = [section for section in sections if part in _tags(section)]
        if len(sections) > 1 and chosen:
            sections = chosen
            continue
        keys.append(str(part))
        if part in (fields := sections[0].model_fields):
            sections = _sections(fields[str(part)].annotation) or sections
    return sections[0], keys


def _tags(section: type[BaseModel]) -> set[str]:
    """The words that choose this section among others: values of its `Literal` keys."""
    types = (field.annotation for field in section.model_fields.values())
    return {word for kind in types if get_origin(kind) is Literal for word in get_args(kind)}


def _sections(annotation: object) -> list[type[BaseModel]]:
    """Every kind of section in a type such as `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def dump(content: Mapping[str, Any]) -> str:
    """YAML text with keys in their own order, innermost lists and mappings on one line."""
    return yaml.safe_dump(
        dict(content), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
