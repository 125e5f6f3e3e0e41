"""What the annotations of nested frozen dataclasses say: the only schema that a config has."""

import collections.abc
import dataclasses
import difflib
import functools
import types
import typing
from typing import Any

NONE = type(None)


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name -> resolved annotation of the fields that the constructor of dataclass `cls` takes, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def is_config(value: Any) -> bool:
    """True for an instance of a dataclass (not for the class)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union (`X | None` -> (X, NoneType)); any other annotation is its own single member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def config_classes(hint: Any) -> dict[str, type]:
    """Name -> dataclass that an annotation allows: its classes and those derived from them, as far as they are imported."""

    def family(cls: type) -> typing.Iterator[type]:
        if dataclasses.is_dataclass(cls):
            yield cls
        for child in cls.__subclasses__():
            yield from family(child)

    plain = [member for member in members(hint) if isinstance(member, type) and not typing.get_origin(member)]
    own = [cls for cls in plain if cls.__module__ not in ("builtins", "typing")]
    return {cls.__name__: cls for one in own for cls in family(one)}


def is_mapping(hint: Any) -> bool:
    """True for `dict[...]` and `Mapping[...]`."""
    origin = typing.get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, collections.abc.Mapping)


def value_type(hint: Any) -> Any:
    """The annotation of the values of a mapping."""
    args = next((typing.get_args(member) for member in members(hint) if is_mapping(member)), ())
    return args[1] if args else Any


def item_types(hint: Any, length: int) -> tuple[Any, ...] | None:
    """Annotations of the `length` items of a tuple annotated `hint`; None if it cannot have that many."""
    args = typing.get_args(hint)
    if not args:
        return (Any,) * length
    if len(args) == 2 and args[1] is Ellipsis:
        return (args[0],) * length
    return args if len(args) == length else None


def type_name(hint: Any) -> str:
    """An annotation in words: `int | None` -> "int or none", Literal["a", "b"] -> "one of a, b"."""
    union = members(hint)
    if len(union) > 1:
        return " or ".join(type_name(member) for member in union)
    if hint is NONE:
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is collections.abc.Callable:
        return "function"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def matches(hint: Any, value: Any) -> bool:
    """True if `value` is of the annotated type; an int may stand for a float, a bool never for a number."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if len(members(hint)) > 1:
        return any(matches(member, value) for member in members(hint))
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if (origin or hint) is tuple:
        items = item_types(hint, len(value)) if isinstance(value, tuple) else None
        return items is not None and all(matches(*pair) for pair in zip(items, value, strict=True))
    if is_mapping(hint):
        key, item = typing.get_args(hint) or (Any, Any)
        return isinstance(value, collections.abc.Mapping) and all(
            matches(key, k) and matches(item, v) for k, v in value.items()
        )
    return isinstance(value, origin or hint) if isinstance(origin or hint, type) else True


def did_you_mean(name: str, candidates: collections.abc.Iterable[str]) -> str:
    """The hint "did you mean 'model'?", or the list of what there is when nothing is near."""
    candidates = list(candidates)
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"there is {', '.join(candidates) or 'nothing'}"


def default_of(cls: type, name: str) -> Any:
    """The default of a field of dataclass `cls`; `dataclasses.MISSING` if it has none."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def children(node: Any) -> list[tuple[str, Any]]:
    """(name, value) of what lies one level below a dataclass (fields), dict (keys) or tuple (indices); else []."""
    if is_config(node):
        return [(name, getattr(node, name)) for name in field_types(type(node))]
    if isinstance(node, collections.abc.Mapping):
        return [(str(key), value) for key, value in node.items()]
    return [(str(index), item) for index, item in enumerate(node)] if isinstance(node, tuple) else []


def show(value: Any) -> str:
    """A value as one would type it on the command line: none, true, 0.0003, 1,2,3; a dataclass as Name(field=...)."""
    if is_config(value):
        return f"{type(value).__name__}({', '.join(f'{name}={show(item)}' for name, item in children(value))})"
    if isinstance(value, collections.abc.Mapping):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return ",".join(map(show, value)) or "()"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
