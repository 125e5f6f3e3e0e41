"""Experiment files and configs as JSON: load, validate, save, compare.

A config is a nest of frozen dataclasses; its fields hold int, float, bool, str, Literal, tuple, `X | None`, other
dataclasses, `dict[str, X]`, or functions. The annotations are the only schema there is.
"""

import collections.abc
import contextlib
import dataclasses
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

from llmjax.config.fields import (
    NONE,
    children,
    config_classes,
    default_of,
    did_you_mean,
    field_types,
    is_config,
    is_mapping,
    item_types,
    matches,
    members,
    show,
    type_name,
    value_type,
)
from llmjax.config.ranges import outside
from llmjax.errors import UserError

_CLASS_TAG = "class"  # a Python keyword, so no field can bear this name
_ALL = object()
_MODULE_PREFIX = "llmjax_experiment_"


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
    with import_root(path):
        get_config = getattr(execute(path), "get_config", None)
        if not callable(get_config):
            raise UserError(f"{where}: {path} has no function get_config; define get_config() -> Experiment in it")
        config = _call_get_config(get_config, arg if separator else None, where)
    if not is_config(config):
        raise UserError(f"{where}: get_config returned a {type(config).__name__}; return a dataclass (an Experiment)")
    return config


@contextlib.contextmanager
def import_root(path: pathlib.Path) -> collections.abc.Iterator[None]:
    """Lets an experiment import its neighbours, by the folder's name where that is a package, while it is loaded."""
    root = path.resolve().parent
    while (root / "__init__.py").exists():
        root = root.parent
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


def execute(path: pathlib.Path) -> types.ModuleType:
    """The module of an experiment file, run anew."""
    name = _MODULE_PREFIX + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: is no Python file; name one that ends in .py")
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
    if arg is not None:
        choices = typing.get_type_hints(get_config).get(parameters[0].name)
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
    """Checks types and ranges against annotations, then calls each dataclass's own `validate(self)`, innermost first.

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
        # A key of a dict of configs may stand in its place on the command line, and so it does here.
        section = is_config(node) and isinstance(value, collections.abc.Mapping) and all(map(is_config, value.values()))
        _validate(value, path if section else child_path)
    if is_config(node):
        try:
            for problem in outside(node):
                raise UserError(problem)
            if callable(getattr(node, "validate", None)):
                node.validate()
        except (ValueError, UserError) as error:
            raise UserError(f"{path}: {error}" if path else str(error)) from error


# ---- to and from JSON -------------------------------------------------------------------------------------------


def to_dict(config: Any, defaults: bool = True) -> dict[str, Any]:
    """The config as plain JSON values. A dataclass that its annotation leaves open carries its name under "class", a
    function is "module:name".

    defaults: False leaves out every field that has its default value, so that a field that is added later changes nothing.
    """
    return _encode(type(config), config, type(config).__name__, _ALL if defaults else None)


def _encode(hint: Any, value: Any, path: str, base: Any) -> Any:
    """base: what fields that equal its own are left out of; None for the defaults of their class, _ALL to keep everything."""
    if is_config(value):
        return _encode_config(hint, value, path, base)
    hint = next((member for member in members(hint) if matches(member, value)), hint)
    if isinstance(value, float) or (hint is float and isinstance(value, int)):
        return float(value) if math.isfinite(value) else str(value)  # JSON has no infinity
    keep = _ALL if base is _ALL else None
    if isinstance(value, (tuple, list)):
        items = item_types(hint, len(value)) or (Any,) * len(value)
        return [_encode(item, v, f"{path}.{i}", keep) for i, (item, v) in enumerate(zip(items, value, strict=True))]
    if isinstance(value, collections.abc.Mapping):
        item = value_type(hint)
        return {str(key): _encode(item, v, f"{path}.{key}", keep) for key, v in value.items()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        module = value.__module__
        if module.startswith(_MODULE_PREFIX):
            module = pathlib.Path(sys.modules[module].__file__ or "").stem
        return f"{module}:{value.__qualname__}"
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved; configs hold numbers, text, dataclasses and functions")


def _encode_config(hint: Any, value: Any, path: str, base: Any) -> dict[str, Any]:
    hints, cls = field_types(type(value)), type(value)
    encoded = {_CLASS_TAG: cls.__name__} if list(config_classes(hint).values()) != [cls] else {}
    for name, item in children(value):
        below = _ALL
        if base is not _ALL:
            below = getattr(base, name) if type(base) is cls else default_of(cls, name)
            if type(below) is type(item) and below == item:
                continue
            below = below if type(below) is type(item) and is_config(item) else None
        encoded[name] = _encode(hints[name], item, f"{path}.{name}", below)
    return encoded


def from_dict(cls: type, data: Any) -> Any:
    """Inverse of `to_dict` for configs without functions; a field that `data` lacks takes its default.

    Raises:
        UserError: an unknown or missing field, or a value of the wrong type, by its dotted path.
    """
    return _decode(cls, data, "", None)


def _decode(hint: Any, data: Any, path: str, base: Any) -> Any:
    """base: where the fields come from that the data of a config lack; None for the defaults of its class."""
    union = members(hint)
    if data is None and (NONE in union or hint is Any):
        return None
    classes = config_classes(hint)
    if isinstance(data, dict) and classes:
        return _decode_config(classes, data, path, base)
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
    if origin is tuple and isinstance(data, list):
        items = item_types(hint, len(data))
        if items is None:
            return data
        pairs = enumerate(zip(items, data, strict=True))
        return tuple(_decode(item, value, f"{path}.{i}", None) for i, (item, value) in pairs)
    if is_mapping(hint) and isinstance(data, dict):
        item = value_type(hint)
        return {key: _decode(item, value, f"{path}.{key}" if path else key, None) for key, value in data.items()}
    return data


def _decode_config(classes: dict[str, type], data: dict, path: str, base: Any) -> Any:
    name = data.get(_CLASS_TAG, next(iter(classes)))
    if name not in classes or (len(classes) > 1 and _CLASS_TAG not in data):
        raise UserError(f"{path or 'config'}: unknown class {data.get(_CLASS_TAG)!r}; {did_you_mean(str(name), classes)}")
    cls = classes[name]
    hints, where = field_types(cls), path or cls.__name__
    for key in data:
        if key not in hints and key != _CLASS_TAG:
            raise UserError(f"{where}: no field '{key}' in {cls.__name__}; {did_you_mean(key, hints)}")
    defaults = {key: getattr(base, key) if type(base) is cls else default_of(cls, key) for key in hints}
    values = defaults | {
        key: _decode(hint, data[key], f"{path}.{key}" if path else key, defaults[key])
        for key, hint in hints.items()
        if key in data
    }
    missing = [key for key, value in values.items() if value is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where}: field '{missing[0]}' of {cls.__name__} is missing and has no default; add it")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_json(config: Any, defaults: bool = True) -> str:
    """Indented JSON, fields in the order of their definition, with a final newline; equal configs give equal text."""
    return json.dumps(to_dict(config, defaults), indent=2, ensure_ascii=False) + "\n"


def fingerprint(config: Any) -> str:
    """12 hex digits that name the content of a config (or of its `to_dict`): SHA-256 of its JSON with sorted keys."""
    data = to_dict(config) if is_config(config) else config
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def diff(a: Any, b: Any) -> list[str]:
    """What changes from config `a` to config `b` (or from one `to_dict` to another): a "model.num_layers: 4 -> 8" per leaf."""
    return _diff(to_dict(a) if is_config(a) else a, to_dict(b) if is_config(b) else b, "")


def _diff(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.get(_CLASS_TAG) == b.get(_CLASS_TAG):
        lines = []
        for name in a | b:
            below = f"{path}.{name}" if path else name
            if name in a and name in b:
                lines += _diff(a[name], b[name], below)
            else:
                sides = [show(side[name]) if name in side else "absent" for side in (a, b)]
                lines.append(f"{below}: {sides[0]} -> {sides[1]}")
        return lines
    same = a == b and isinstance(a, bool) == isinstance(b, bool)
    return [] if same else [f"{path or 'config'}: {show(a)} -> {show(b)}"]
