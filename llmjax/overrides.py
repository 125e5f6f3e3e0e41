"""Dotted overrides of frozen dataclasses from the command line: `--config.model.num_layers=4`.

`ml_collections.config_flags` writes with `setattr`, which frozen dataclasses refuse, and answers a wrong nested name
with a bare KeyError; so the overrides are taken out of argv before absl sees it, and applied by replacement.
"""

import collections.abc
import dataclasses
import decimal
import enum
import math
import typing
from typing import Any

from llmjax.annotations import (
    children,
    did_you_mean,
    field_types,
    is_config,
    is_config_class,
    is_mapping,
    item_types,
    members,
    show,
    type_name,
)
from llmjax.errors import UserError

_NONE = type(None)
_EXAMPLES = {bool: "true", int: "8", float: "3e-4", str: "text"}
_MAX_DIGITS = 30  # 1e30 is an integer, 1e999999999 an accident that would fill the memory


def split_overrides(argv: list[str], flag: str = "config") -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` and `--config.a.b value` (one or two dashes) out of a command line.

    Args:
        argv: the command line; what follows a bare "--" is left alone.
        flag: name of the flag whose overrides are meant.

    Returns:
        (the other arguments in order, [("a.b", "value")] in order). `--config=FILE` itself stays with the others.

    Raises:
        UserError: an override without a value or with an empty name in its path.
    """
    rest, overrides, index = [], [], 0
    while index < len(argv):
        argument = argv[index]
        index += 1
        if argument == "--":
            rest += argv[index - 1:]
            break
        name, equals, value = argument.partition("=")
        path = next((name[len(p):] for p in (f"--{flag}.", f"-{flag}.") if name.startswith(p)), None)
        if path is None:
            rest.append(argument)
            continue
        if not equals:
            if index == len(argv) or argv[index].startswith("--"):
                raise UserError(f"{argument}: no value; write {argument}=VALUE")
            value = argv[index]
            index += 1
        if not all(path.split(".")):
            raise UserError(f"{argument}: an empty name in the path; write --{flag}.FIELD.FIELD=VALUE")
        overrides.append((path, value))
    return rest, overrides


def apply_overrides(config: Any, overrides: list[tuple[str, str]], flag: str = "config") -> Any:
    """The config with each dotted path set to its value, cast by the field's annotation; `config` is left as it is.

    A path walks through fields of dataclasses, keys of dicts and indices of tuples. Setting a field below an optional
    dataclass that is None creates it with its defaults. In a dataclass with a field `dict[str, X]` (a study) the first
    name may also be a key of that dict, or a field of X, which then sets it in every X; where some X hold the
    optional dataclass that the path goes through and others hold None, those with None are left alone (an override
    of `model.moe.top_k` does not make the dense half of a comparison sparse).

    Raises:
        UserError: one line with the flag, what is wrong and what is right: an unknown name, a value of the wrong type.
    """
    for path, raw in overrides:
        config = _set(config, type(config), path.split("."), raw, _Place(flag, path, raw))
    return config


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an override stands on the command line, for its error."""

    flag: str
    path: str
    raw: str

    def error(self, problem: str) -> UserError:
        return UserError(f"--{self.flag}.{self.path}={self.raw}: {problem}")


def _set(node: Any, hint: Any, parts: list[str], raw: str, place: _Place) -> Any:
    """`node` (annotated `hint`) with what lies at `parts` below it replaced; with no parts left, the new value."""
    if not parts:
        return _cast_or_explain(hint, raw, place)
    if node is None:
        node = _create(hint, parts, place)
    if is_config(node):
        return _set_field(node, parts, raw, place)
    if isinstance(node, collections.abc.Mapping):
        if parts[0] not in node:
            raise place.error(f"no key '{parts[0]}'; {did_you_mean(parts[0], node)}")
        item = (typing.get_args(hint) or (Any, Any))[1]
        return {**node, parts[0]: _set(node[parts[0]], item, parts[1:], raw, place)}
    if isinstance(node, tuple):
        return _set_item(node, hint, parts, raw, place)
    above = place.path.split(".")[:-len(parts)]
    raise place.error(f"'{'.'.join(above)}' is of type {type_name(hint)} and has no fields; set it itself")


def _set_field(node: Any, parts: list[str], raw: str, place: _Place) -> Any:
    hints = field_types(type(node))
    name = parts[0]
    if name in hints:
        return _replace(node, name, _set(getattr(node, name), hints[name], parts[1:], raw, place), place)
    studies = {field: getattr(node, field) for field in hints if _holds_configs(getattr(node, field))}
    for field, entries in studies.items():
        if name in entries:
            return _replace(node, field, _set(entries, hints[field], parts, raw, place), place)
    known = [*hints, *(key for entries in studies.values() for key in entries)]
    for field, entries in studies.items():
        having = {key: entry for key, entry in entries.items() if name in field_types(type(entry))}
        reached = {key for key, entry in having.items() if _reaches(entry, parts)} or set(having)
        if reached:
            changed = {k: _set_field(v, parts, raw, place) if k in reached else v for k, v in entries.items()}
            return _replace(node, field, changed, place)
        known += [other for entry in entries.values() for other in field_types(type(entry)) if other not in known]
    raise place.error(f"no field '{name}' in {type(node).__name__}; {did_you_mean(name, known)}")


def _set_item(node: tuple, hint: Any, parts: list[str], raw: str, place: _Place) -> tuple:
    if not parts[0].isdecimal() or int(parts[0]) >= len(node):
        raise place.error(f"no item '{parts[0]}' in a tuple of {len(node)}; items are numbered from 0")
    union = [member for member in members(hint) if (typing.get_origin(member) or member) is tuple]
    items = (item_types(union[0], len(node)) if union else None) or (Any,) * len(node)
    index = int(parts[0])
    return (*node[:index], _set(node[index], items[index], parts[1:], raw, place), *node[index + 1:])


def _holds_configs(value: Any) -> bool:
    return isinstance(value, collections.abc.Mapping) and bool(value) and all(map(is_config, value.values()))


def _reaches(node: Any, parts: list[str]) -> bool:
    """True if the path exists without creating anything on the way."""
    for name in parts[:-1]:
        node = dict(children(node)).get(name)
    return node is not None


def _replace(node: Any, name: str, value: Any, place: _Place) -> Any:
    try:
        return dataclasses.replace(node, **{name: value})
    except (ValueError, UserError) as error:  # from the dataclass's own __post_init__
        raise place.error(str(error)) from error


def _create(hint: Any, parts: list[str], place: _Place) -> Any:
    above = ".".join(place.path.split(".")[:-len(parts)])
    classes = [member for member in members(hint) if is_config_class(member)]
    if not classes:
        raise place.error(f"'{above}' is none and holds no fields; set it itself")
    if len(classes) > 1:
        names = ", ".join(cls.__name__ for cls in classes)
        raise place.error(f"'{above}' is none and could be any of {names}; choose one in the experiment file")
    try:
        return classes[0]()
    except (TypeError, ValueError, UserError) as error:
        raise place.error(
            f"'{above}' is none and {classes[0].__name__} cannot be made from its defaults ({error}); "
            "set it in the experiment file"
        ) from error


# ---- casting ----------------------------------------------------------------------------------------------------


def _cast_or_explain(hint: Any, raw: str, place: _Place) -> Any:
    try:
        return cast(hint, raw)
    except ValueError as error:
        raise place.error(str(error)) from None
    except _WrongType:
        example = f"--{place.flag}.{place.path}={example_of(hint)}"
        raise place.error(f"expected {type_name(hint)}; for example {example}") from None


class _WrongType(Exception):
    """The text does not read as a value of the annotated type; the caller knows the field and says what would."""


def cast(hint: Any, raw: str) -> Any:
    """The value of type `hint` that the text `raw` stands for.

    Numbers may be written 2_000 or 1e6 (an int if whole); "none" is None where the annotation allows it; tuples are
    "1,2,3" or "(1, 2)"; a Literal or an Enum is given by its name.

    Raises:
        _WrongType: `raw` is no such value.
        ValueError: the annotation cannot be set from text at all, or its choices do not hold `raw` (in words).
    """
    union = members(hint)
    if len(union) > 1:
        return _cast_union(union, raw)
    if hint in _CASTERS:
        return _CASTERS[hint](raw)
    if hint is Any:
        return raw
    if typing.get_origin(hint) is typing.Literal:
        return _choose({str(choice): choice for choice in typing.get_args(hint)}, raw)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choose({str(member.value): member for member in hint} | dict(hint.__members__), raw, hint.__members__)
    if (typing.get_origin(hint) or hint) is tuple:
        return _cast_tuple(hint, raw)
    if is_config_class(hint):
        fields = ", ".join(field_types(hint))
        raise ValueError(f"{hint.__name__} cannot be set as a whole; set one of its fields: {fields}")
    if is_mapping(hint):
        raise ValueError(f"{type_name(hint)} cannot be set as a whole; set one of its keys")
    raise ValueError(f"a {type_name(hint)} cannot be set from the command line; set it in the experiment file")


def _cast_union(union: tuple[Any, ...], raw: str) -> Any:
    if _NONE in union and raw.strip().lower() == "none":
        return None
    candidates = [member for member in union if member is not _NONE]
    if len(candidates) == 1:
        return cast(candidates[0], raw)
    explained = None
    for member in sorted(candidates, key=lambda member: member is str):  # str takes any text, so it comes last
        try:
            return cast(member, raw)
        except _WrongType:
            continue
        except ValueError as error:
            explained = explained or error
    raise explained or _WrongType(raw)


def _choose(choices: dict[str, Any], raw: str, names: collections.abc.Iterable[str] | None = None) -> Any:
    if raw not in choices:
        listed = list(choices if names is None else names)
        near = did_you_mean(raw, listed)
        raise ValueError(f"expected one of {', '.join(listed)}" + (f"; {near}" if near.startswith("did") else ""))
    return choices[raw]


def _to_bool(raw: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if raw.strip().lower() not in values:
        raise _WrongType(raw)
    return values[raw.strip().lower()]


def _to_int(raw: str) -> int:
    try:
        value = decimal.Decimal(raw.strip())
    except decimal.InvalidOperation:
        raise _WrongType(raw) from None
    if not value.is_finite() or value.adjusted() > _MAX_DIGITS or value != value.to_integral_value():
        raise _WrongType(raw)
    return int(value)


def _to_float(raw: str) -> float:
    try:
        value = float(raw)
    except ValueError:
        raise _WrongType(raw) from None
    if math.isnan(value):
        raise _WrongType(raw)
    return value


_CASTERS: dict[Any, collections.abc.Callable[[str], Any]] = {bool: _to_bool, int: _to_int, float: _to_float, str: str}


def _cast_tuple(hint: Any, raw: str) -> tuple:
    texts = _split_items(raw)
    items = item_types(hint, len(texts))
    if items is None:
        raise _WrongType(raw)
    return tuple(cast(str if item is Any else item, text) for item, text in zip(items, texts, strict=True))


def _split_items(raw: str) -> list[str]:
    """Splits "(1, 2), 3" at its outer commas; drops brackets around the whole, quotes around items, a last comma."""
    raw = raw.strip()
    if raw[:1] + raw[-1:] in ("()", "[]") and _closes_at_end(raw):
        raw = raw[1:-1].strip()
    items, depth, start = [], 0, 0
    for index, char in enumerate(raw + ","):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth <= 0:
            items.append(raw[start:index].strip())
            start = index + 1
    if items and not items[-1]:
        items.pop()
    return [item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item for item in items]


def _closes_at_end(raw: str) -> bool:
    """True if the bracket that opens `raw` is the one that ends it: not so in "(1,2),(3,4)"."""
    depth = 0
    for index, char in enumerate(raw):
        depth += (char in "([") - (char in ")]")
        if depth == 0:
            return index == len(raw) - 1
    return False


def example_of(hint: Any) -> str:
    """A text that `cast` would take for `hint`."""
    hint = next((member for member in members(hint) if member is not _NONE), hint)
    if typing.get_origin(hint) is typing.Literal:
        return show(typing.get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint.__members__))
    if (typing.get_origin(hint) or hint) is tuple:
        args = typing.get_args(hint)
        count = 2 if len(args) == 2 and args[1] is Ellipsis else len(args)
        return ",".join(example_of(item) for item in item_types(hint, count))
    return _EXAMPLES.get(hint, "VALUE")
