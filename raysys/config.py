"""Frozen dataclasses from YAML and `--set a.b=c`, checked; and back to plain dicts.

The dataclasses themselves stand beside their owners (`models/interest.py` holds
`InterestConfig`); this file only knows how to fill one.
"""

import dataclasses
import datetime
import difflib
import types
import typing
from typing import Any, TypeVar

import yaml

from raysys import storage
from raysys.errors import ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], values: dict | None, *, where: str = "") -> T:
    """Build a dataclass from nested dicts, refusing unknown keys and wrong types.

    Args:
        cls: a dataclass; nested dataclass fields are filled from nested dicts.
        values: field values; missing fields keep their defaults.
        where: dotted prefix for messages.

    Raises:
        ConfigError: naming the key, what was expected and what was found.
    """
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    filled = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(fields))}"
            raise ConfigError(f"unknown setting {name!r}{hint}")
        filled[key] = _convert(hints[key], value, name)
    try:
        return cls(**filled)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from None


def _convert(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, name)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, typing.cast(type, kind)) else from_dict(typing.cast(type, kind), value, where=name)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{name}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(_convert(arguments[0], item, name) for item in value)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if kind is str and isinstance(value, datetime.date):
        return value.isoformat()  # YAML reads 2020-01-31 as a date
    if kind is Any or (isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise ConfigError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def to_dict(value: Any) -> Any:
    """A dataclass as plain dicts, lists and scalars, for YAML and JSON."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def read_yaml(uri: str) -> dict:
    """Parse a YAML mapping.

    Raises:
        ConfigError: the file is missing, not YAML or not a mapping.
    """
    if not storage.exists(uri):
        raise ConfigError(f"config file {uri!r} does not exist")
    try:
        values = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{uri}: expected a mapping of settings, got {type(values).__name__}")
    return values


def merge(base: dict, extra: dict) -> dict:
    """Nested update: values of `extra` win, mappings are merged key by key."""
    merged = dict(base)
    for key, value in extra.items():
        merged[key] = merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def parse_overrides(pairs: list[str]) -> dict:
    """Turn `["interest.dim=32", "seed=1"]` into nested dicts; values are YAML scalars.

    Raises:
        ConfigError: a pair has no `=`.
    """
    values: dict = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set expects key=value, got {pair!r}")
        nested: Any = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


def load(cls: type[T], uri: str | None = None, overrides: list[str] | None = None) -> T:
    """A dataclass from an optional YAML file and `--set` pairs, the latter winning."""
    values = read_yaml(uri) if uri else {}
    return from_dict(cls, merge(values, parse_overrides(overrides or [])))
