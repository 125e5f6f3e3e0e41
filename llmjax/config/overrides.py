"""Dotted overrides of frozen dataclasses from the command line: `--config.model.num_layers=4`.

`ml_collections.config_flags` writes with `setattr`, which frozen dataclasses refuse, and answers a wrong nested name
with a bare KeyError; so the overrides are taken out of argv before absl sees it, and applied by replacement.
"""

import collections.abc
import dataclasses
import decimal
import math
import typing
from typing import Any

from llmjax.config.fields import (
    NONE,
    config_classes,
    did_you_mean,
    field_types,
    is_config,
    is_mapping,
    item_types,
    members,
    show,
    type_name,
    value_type,
)
from llmjax.errors import UserError

_EXAMPLES = {bool: "true", int: "8", float: "3e-4", str: "text"}
_MAX_DIGITS = 30  # 1e30 is an integer, 1e999999999 an accident that would fill the memory
_MISSING = object()


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
            rest += argv[index - 1 :]
            break
        name, equals, value = argument.partition("=")
        path = next((name[len(p) :] for p in (f"--{flag}.", f"-{flag}.") if name.startswith(p)), None)
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

    A path walks through fields of dataclasses and keys of dicts; where a dataclass has a field `dict[str, X]` of other
    dataclasses (the stages of an experiment, the experiments of a study), a key of that dict may stand in the field's place.
    "none" takes such an entry out. Setting a field below an optional dataclass that is None creates it with its
    defaults; the name of a class, where several are allowed, makes one of its defaults (--config.ppo.algorithm=GRPO).
    A dataclass with `shared = ("field",)` (a study) hands a path that it does not know itself to every entry of that dict
    that knows it; where some entries hold the optional dataclass that the path goes through and others None, those with None
    are left alone (an override of `model.moe.top_k` does not make the dense half of a comparison sparse).

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

    def above(self, parts: list[str]) -> str:
        return ".".join(self.path.split(".")[: -len(parts)])


def _set(node: Any, hint: Any, parts: list[str], raw: str, place: _Place) -> Any:
    """`node` (annotated `hint`) with what lies at `parts` below it replaced; with no parts left, the new value."""
    if not parts:
        return _new_value(hint, raw, place)
    if node is None:
        node = _create(hint, parts, place)
    if is_config(node):
        return _set_field(node, hint, parts, raw, place)
    if isinstance(node, collections.abc.Mapping):
        name, *below = parts
        item = value_type(hint)
        if name not in node and config_classes(item):
            raise place.error(f"no key '{name}'; {did_you_mean(name, node)}")
        if not below and raw.strip().lower() == "none" and NONE not in members(item):
            return {key: value for key, value in node.items() if key != name}
        return {**node, name: _set(node.get(name), item, below, raw, place)}
    raise place.error(f"'{place.above(parts)}' is of type {type_name(hint)} and has no fields; set it itself")


def _set_field(node: Any, hint: Any, parts: list[str], raw: str, place: _Place) -> Any:
    hints, name = field_types(type(node)), parts[0]
    if name in hints:
        return _replace(node, name, _set(getattr(node, name), hints[name], parts[1:], raw, place), place)
    sections = _sections(node)
    for field, entries in sections.items():
        if name in entries:
            return _replace(node, field, _set(entries, hints[field], parts, raw, place), place)
    for field in getattr(type(node), "shared", ()):
        entries = sections.get(field, {})
        having = {key for key, entry in entries.items() if _below(entry, name) is not _MISSING}
        reached = {key for key in having if _reaches(entries[key], parts)} or having
        if reached:
            item = value_type(hints[field])
            changed = {k: _set_field(v, item, parts, raw, place) if k in reached else v for k, v in entries.items()}
            return _replace(node, field, changed, place)
    others = [cls for cls in config_classes(hint).values() if cls is not type(node) and name in field_types(cls)]
    if others:
        above = place.above(parts)
        known = " or ".join(f"--{place.flag}.{above}={cls.__name__}" for cls in others[:3])
        raise place.error(f"no field '{name}' in {type(node).__name__}; give {known} before it")
    raise place.error(f"no field '{name}' in {type(node).__name__}; {did_you_mean(name, _known(node))}")


def _sections(node: Any) -> dict[str, collections.abc.Mapping]:
    """The fields of a dataclass that are dicts of dataclasses."""
    values = {name: getattr(node, name) for name in field_types(type(node))}
    return {
        name: value for name, value in values.items()
        if isinstance(value, collections.abc.Mapping) and value and all(map(is_config, value.values()))
    }


def _known(node: Any) -> list[str]:
    """Every name that a path may go on with at `node`."""
    sections = _sections(node)
    names = [*field_types(type(node)), *(key for entries in sections.values() for key in entries)]
    for field in getattr(type(node), "shared", ()):
        names += [name for entry in sections.get(field, {}).values() for name in _known(entry)]
    return list(dict.fromkeys(names))


def _below(node: Any, name: str) -> Any:
    """What a path goes on to from `node`, `_MISSING` if nothing has the name."""
    if is_config(node):
        if name in field_types(type(node)):
            return getattr(node, name)
        return next((entries[name] for entries in _sections(node).values() if name in entries), _MISSING)
    return node.get(name, _MISSING) if isinstance(node, collections.abc.Mapping) else _MISSING


def _reaches(node: Any, parts: list[str]) -> bool:
    """True if the path exists without creating anything on the way."""
    for name in parts[:-1]:
        node = _below(node, name)
    return node is not None and node is not _MISSING


def _replace(node: Any, name: str, value: Any, place: _Place) -> Any:
    try:
        return dataclasses.replace(node, **{name: value})
    except (ValueError, UserError) as error:  # from the dataclass's own __post_init__
        raise place.error(str(error)) from error


def _create(hint: Any, parts: list[str], place: _Place) -> Any:
    above, classes = place.above(parts), config_classes(hint)
    if not classes and any(is_mapping(member) for member in members(hint)):
        return {}
    if not classes:
        raise place.error(f"'{above}' is none and holds no fields; set it itself")
    if len(classes) > 1:
        raise place.error(f"'{above}' is none and could be {' or '.join(classes)}; give --{place.flag}.{above}=NAME before it")
    return _instance(next(iter(classes.values())), above, place)


def _instance(cls: type, where: str, place: _Place) -> Any:
    try:
        return cls()
    except (TypeError, ValueError, UserError) as error:
        raise place.error(
            f"{cls.__name__} cannot be made from its defaults ({error}); set '{where}' in the experiment file"
        ) from error


# ---- casting ----------------------------------------------------------------------------------------------------


def _new_value(hint: Any, raw: str, place: _Place) -> Any:
    classes = config_classes(hint)
    if classes and raw in classes:
        return _instance(classes[raw], place.path, place)
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
    "1,2,3" or "(1, 2)"; a Literal is given by its text.

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
    if (typing.get_origin(hint) or hint) is tuple:
        return _cast_tuple(hint, raw)
    classes = config_classes(hint)
    if len(classes) > 1:
        raise ValueError(f"expected one of {', '.join(classes)}, or a path to one of the fields below it")
    if classes:
        fields = ", ".join(field_types(next(iter(classes.values()))))
        raise ValueError(f"{next(iter(classes))} cannot be set as a whole; set one of its fields: {fields}")
    if is_mapping(hint):
        raise ValueError(f"{type_name(hint)} cannot be set as a whole; set one of its keys")
    raise ValueError(f"a {type_name(hint)} cannot be set from the command line; set it in the experiment file")


def _cast_union(union: tuple[Any, ...], raw: str) -> Any:
    if NONE in union and raw.strip().lower() == "none":
        return None
    candidates = [member for member in union if member is not NONE]
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


def _choose(choices: dict[str, Any], raw: str) -> Any:
    if raw not in choices:
        near = did_you_mean(raw, choices)
        raise ValueError(f"expected one of {', '.join(choices)}" + (f"; {near}" if near.startswith("did") else ""))
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
    raw = raw.strip()
    if raw[:1] + raw[-1:] in ("()", "[]"):
        raw = raw[1:-1]
    texts = [text.strip().strip("'\"") for text in raw.rstrip(", ").split(",")] if raw.strip(", ") else []
    items = item_types(hint, len(texts))
    if items is None:
        raise _WrongType(raw)
    return tuple(cast(str if item is Any else item, text) for item, text in zip(items, texts, strict=True))


def example_of(hint: Any) -> str:
    """A text that `cast` would take for `hint`."""
    hint = next((member for member in members(hint) if member is not NONE), hint)
    if typing.get_origin(hint) is typing.Literal:
        return show(typing.get_args(hint)[0])
    if (typing.get_origin(hint) or hint) is tuple:
        args = typing.get_args(hint)
        count = 2 if len(args) == 2 and args[1] is Ellipsis else len(args)
        return ",".join(example_of(item) for item in item_types(hint, count) or ())
    return _EXAMPLES.get(hint, "VALUE")
