"""Tools around the frozen, typed dataclasses that describe an experiment: load, override, validate, save, compare.

A config is a nest of frozen dataclasses; its fields hold int, float, bool, str, Literal, Enum, tuple, `X | None`, other
dataclasses, or `dict[str, X]` (a study of several experiments). The annotations are the only schema there is.
The path language of the command line is in `llmjax.overrides`, offered here too. Nothing here imports jax.
"""

import collections.abc
import contextlib
import enum
import hashlib
import importlib.util
import inspect
import json
import math
import pathlib
import sys
import types
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
    matches,
    members,
    required_fields,
    show,
    type_name,
)
from llmjax.errors import UserError
from llmjax.overrides import apply_overrides, split_overrides

__all__ = [
    "apply_overrides", "describe", "diff", "fingerprint", "from_dict", "from_json", "load_experiment",
    "split_overrides", "to_dict", "to_json", "validate",
]

_CLASS_TAG = "class"  # a Python keyword, so no field can bear this name


# ---- experiment files -------------------------------------------------------------------------------------------


def load_experiment(spec: str) -> Any:
    """The config that an experiment file returns.

    Args:
        spec: "path/to/file.py" or "path/to/file.py:arg"; calls the file's `get_config()` or `get_config("arg")`.

    Returns:
        The dataclass that `get_config` returned (neither overridden nor validated yet).

    Raises:
        UserError: no such file, no `get_config`, a wrong argument, or a ValueError/UserError that `get_config` raised.
            Any other exception of the file is a bug in it and passes through with its traceback.
    """
    head, separator, arg = spec.partition(".py:")
    path = pathlib.Path(head + ".py" if separator else spec)
    where = f"--config={spec}"
    if not path.is_file():
        known = [str(other) for other in sorted(path.parent.glob("*.py")) if other.stem != "__init__"]
        raise UserError(f"{where}: no file {path}; {did_you_mean(str(path), known)}")
    with _import_root(path):
        get_config = getattr(_execute(path), "get_config", None)
        if not callable(get_config):
            raise UserError(f"{where}: {path} has no function get_config; define get_config() -> Experiment in it")
        config = _call_get_config(get_config, arg if separator else None, where)
    if not is_config(config):
        raise UserError(f"{where}: get_config returned a {type(config).__name__}; return a dataclass (an Experiment)")
    return config


@contextlib.contextmanager
def _import_root(path: pathlib.Path) -> collections.abc.Iterator[None]:
    """Lets an experiment import its neighbours, by the folder's name where that is a package, while it is loaded."""
    root = path.resolve().parent
    while (root / "__init__.py").exists():
        root = root.parent
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


def _execute(path: pathlib.Path) -> types.ModuleType:
    name = "llmjax_experiment_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in the file resolve their annotations through sys.modules
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _call_get_config(get_config: collections.abc.Callable, arg: str | None, where: str) -> Any:
    parameters = list(inspect.signature(get_config).parameters.values())
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if arg is not None and not parameters:
        raise UserError(f"{where}: its get_config() takes no argument; leave out ':{arg}'")
    if arg is None and required:
        raise UserError(f"{where}: its get_config needs an argument; write --config=FILE.py:{required[0].upper()}")
    choices = typing.get_type_hints(get_config).get(parameters[0].name) if arg is not None else None
    if typing.get_origin(choices) is typing.Literal and arg not in typing.get_args(choices):
        raise UserError(f"{where}: unknown argument '{arg}'; {did_you_mean(arg, typing.get_args(choices))}")
    try:
        return get_config() if arg is None else get_config(arg)
    except (ValueError, UserError) as error:
        raise UserError(f"{where}: {error}") from error
    except KeyError as error:
        if arg is None or error.args != (arg,):
            raise
        raise UserError(f"{where}: unknown argument '{arg}'; look in the file for what get_config takes") from error


# ---- validation -------------------------------------------------------------------------------------------------


def validate(config: Any) -> None:
    """Checks types against annotations, then calls each dataclass's own `validate(self)`, innermost first.

    Raises:
        UserError: one line that begins with the dotted path, "model.moe: top_k=9 ..."; a ValueError or UserError of
            a `validate` method is re-raised so. Anything else that it raises is a bug and passes through.
    """
    _validate(config, "")


def _validate(node: Any, path: str) -> None:
    for name, value in children(node):
        child_path = f"{path}.{name}" if path else name
        if is_config(node) and not matches(field_types(type(node))[name], value):
            expected = type_name(field_types(type(node))[name])
            raise UserError(f"{child_path}={value!r}: expected {expected}, got {type(value).__name__}; mend the config")
        _validate(value, child_path)
    if is_config(node) and callable(getattr(node, "validate", None)):
        try:
            node.validate()
        except (ValueError, UserError) as error:
            raise UserError(f"{path or type(node).__name__}: {error}") from error


# ---- to and from JSON -------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values. A dataclass that its annotation leaves open carries its name under "class"."""
    return _encode(type(config), config, type(config).__name__)


def _encode(hint: Any, value: Any, path: str) -> Any:
    if is_config(value):
        tag = {_CLASS_TAG: type(value).__name__} if _needs_tag(hint, value) else {}
        hints = field_types(type(value))
        return tag | {name: _encode(hints[name], item, f"{path}.{name}") for name, item in children(value)}
    hint = next((member for member in members(hint) if matches(member, value)), hint)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float) or (hint is float and isinstance(value, int)):
        return float(value) if math.isfinite(value) else str(value)  # JSON has no infinity
    if isinstance(value, tuple):
        items = item_types(hint, len(value)) or (Any,) * len(value)
        return [_encode(item, v, f"{path}.{i}") for i, (item, v) in enumerate(zip(items, value, strict=True))]
    if isinstance(value, collections.abc.Mapping):
        item = (typing.get_args(hint) or (Any, Any))[1]
        return {str(key): _encode(item, v, f"{path}.{key}") for key, v in value.items()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved; configs hold numbers, text and dataclasses")


def _needs_tag(hint: Any, value: Any) -> bool:
    classes = [member for member in members(hint) if is_config_class(member)]
    return len(classes) != 1 or classes[0] is not type(value)


def from_dict(cls: type, data: Any) -> Any:
    """Inverse of `to_dict`; a field that `data` lacks takes its default.

    Raises:
        UserError: an unknown or missing field, or a value of the wrong type, by its dotted path.
    """
    return _decode(cls, data, "")


def _decode(hint: Any, data: Any, path: str) -> Any:
    union = members(hint)
    if data is None and (type(None) in union or hint is Any):
        return None
    classes = [member for member in union if is_config_class(member)]
    if isinstance(data, dict) and classes:
        return _decode_config(_pick_class(classes, data, path), data, path)
    for member in union:
        value = _decode_plain(member, data, path)
        if matches(member, value):
            return value
    raise UserError(f"{path or 'config'}={data!r}: expected {type_name(hint)}; mend the saved config")


def _decode_plain(hint: Any, data: Any, path: str) -> Any:
    """`data` in the form that `hint` asks for; unchanged where it has none (the caller's `matches` then refuses it)."""
    origin = typing.get_origin(hint) or hint
    if hint is float and (data in ("inf", "-inf", "nan") or (isinstance(data, int) and not isinstance(data, bool))):
        return float(data)
    if isinstance(hint, type) and issubclass(hint, enum.Enum) and isinstance(data, str):
        return hint.__members__.get(data, data)
    if origin is tuple and isinstance(data, list):
        items = item_types(hint, len(data))
        return data if items is None else tuple(
            _decode(item, value, f"{path}.{i}") for i, (item, value) in enumerate(zip(items, data, strict=True))
        )
    if is_mapping(hint) and isinstance(data, dict):
        item = (typing.get_args(hint) or (Any, Any))[1]
        return {key: _decode(item, value, f"{path}.{key}" if path else key) for key, value in data.items()}
    return data


def _pick_class(classes: list[type], data: dict, path: str) -> type:
    name = data.get(_CLASS_TAG)
    if name is None and len(classes) == 1:
        return classes[0]
    family = {cls.__name__: cls for base in classes for cls in _with_subclasses(base)}
    if name not in family:
        raise UserError(f"{path or 'config'}: unknown class {name!r}; {did_you_mean(str(name), family)}")
    return family[name]


def _with_subclasses(cls: type) -> list[type]:
    return [cls] + [sub for child in cls.__subclasses__() for sub in _with_subclasses(child)]


def _decode_config(cls: type, data: dict, path: str) -> Any:
    hints = field_types(cls)
    where = path or cls.__name__
    for name in data:
        if name not in hints and name != _CLASS_TAG:
            raise UserError(f"{where}: no field '{name}' in {cls.__name__}; {did_you_mean(name, hints)}")
    values = {
        name: _decode(hint, data[name], f"{path}.{name}" if path else name)
        for name, hint in hints.items() if name in data
    }
    missing = [name for name in required_fields(cls) if name not in data]
    if missing:
        raise UserError(f"{where}: field '{missing[0]}' of {cls.__name__} is missing and has no default; add it")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_json(config: Any) -> str:
    """Indented JSON, fields in the order of their definition, with a final newline; equal configs give equal text."""
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(cls: type, text: str) -> Any:
    """Inverse of `to_json`. Raises UserError on text that is not JSON, and as `from_dict` does."""
    try:
        return from_dict(cls, json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"config: line {error.lineno} is not JSON ({error.msg}); restore the saved config") from error


def fingerprint(config: Any) -> str:
    """12 hex digits that name the content of a config (or of its `to_dict`): SHA-256 of its JSON with sorted keys."""
    data = to_dict(config) if is_config(config) else config
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


# ---- reading and comparing --------------------------------------------------------------------------------------


def diff(a: Any, b: Any) -> list[str]:
    """What changes from config `a` to config `b`, one "model.num_layers: 4 -> 8" per differing leaf."""
    return _diff(a, b, "")


def _diff(a: Any, b: Any, path: str) -> list[str]:
    if type(a) is type(b) and (is_config(a) or isinstance(a, collections.abc.Mapping)):
        old, new = dict(children(a)), dict(children(b))
        lines = []
        for name in old | new:
            child_path = f"{path}.{name}" if path else name
            if name in old and name in new:
                lines += _diff(old[name], new[name], child_path)
            else:
                sides = [show(side[name]) if name in side else "absent" for side in (old, new)]
                lines.append(f"{child_path}: {sides[0]} -> {sides[1]}")
        return lines
    same = a == b and isinstance(a, bool) == isinstance(b, bool)
    return [] if same else [f"{path or 'config'}: {show(a)} -> {show(b)}"]


def describe(config: Any) -> str:
    """The config as an indented outline, one field a line, values as `show` writes them; no final newline."""
    return "\n".join([type(config).__name__, *_outline(config, 1)])


def _outline(node: Any, depth: int) -> list[str]:
    lines = []
    for name, value in children(node):
        nested = is_config(value) or isinstance(value, collections.abc.Mapping) or (
            isinstance(value, tuple) and any(is_config(item) for item in value)
        )
        text = type(value).__name__ if is_config(value) else "" if nested else show(value)
        lines.append(f"{'  ' * depth}{name}: {text}".rstrip())
        lines += _outline(value, depth + 1) if nested else []
    return lines
