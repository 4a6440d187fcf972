"""The search space of `raysys tune`: read from YAML, checked, drawn from. No Ray here."""

import dataclasses
import itertools
import math
import typing
from typing import Any

import numpy as np

from raysys import config
from raysys.errors import ConfigError
from raysys.train.config import TrainConfig

DEFAULT_SEARCH: dict[str, dict] = {
    "interest.dropout": {"uniform": [0.1, 0.6]},
    "encoder.lr": {"loguniform": [1e-3, 1e-2]},
    "encoder.weight_decay": {"choice": [0.0, 0.01, 0.1, 0.3]},
    "interest.dim": {"choice": [32, 64, 128]},
}
KINDS = ("choice", "uniform", "loguniform", "randint")
SEARCHED = ("interest.", "encoder.")
"""Only these change what a trial measures."""
FIXED = {"encoder.epochs": "it is the length of a trial, and the scheduler decides who gets all of it"}
MAX_GRID = 10_000
SHAPES = tuple(f"interest.{name}" for name in ("dim", "num_layers", "num_heads", "max_length", "ffn_multiplier", "gated", "positions"))
"""They change the shape of the weights, so a trial cannot change them on its way."""


def read_search(values: Any) -> dict[str, dict]:
    """The search space as {dotted name: {kind: values}}; the default one when there is none.

    Names may be dotted or nested. Kinds: `choice: [...]`, `uniform: [low, high]`, `loguniform: [low, high]`, `randint: [low, high]`
    (both ends included).

    Raises:
        ConfigError: naming the setting, what was expected and what was found.
    """
    if values is None:
        return DEFAULT_SEARCH
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"search: expected a mapping of settings, got {values!r}")
    space = {}
    for name, domain in _domains(values):
        known = f"expected one of {', '.join(KINDS)}, such as {{uniform: [0.1, 0.5]}}"
        if not isinstance(domain, dict) or len(domain) != 1 or next(iter(domain)) not in KINDS:
            raise ConfigError(f"search.{name}: {known}, got {domain!r}")
        if name in FIXED or not name.startswith(SEARCHED):
            why = FIXED.get(name, f"only settings under {' and '.join(part.rstrip('.') for part in SEARCHED)} change what a trial measures")
            raise ConfigError(f"search.{name}: cannot be searched, because {why}")
        kind, bounds = next(iter(domain.items()))
        space[name] = {kind: _bounds(name, kind, bounds)}
        for value in space[name][kind]:
            _check_value(name, value)
    return space


def draw(search: dict[str, dict], count: int, seed: int) -> list[dict]:
    """`count` points of the search space, {dotted name: value} each."""
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(count):
        point: dict[str, Any] = {}
        for name, domain in search.items():
            kind, bounds = next(iter(domain.items()))
            if kind == "choice":
                point[name] = bounds[int(rng.integers(len(bounds)))]
            elif kind == "randint":
                point[name] = int(rng.integers(bounds[0], bounds[1] + 1))
            elif kind == "uniform":
                point[name] = float(f"{rng.uniform(*bounds):.4g}")
            else:
                point[name] = float(f"{np.exp(rng.uniform(*np.log(bounds))):.4g}")
        points.append(point)
    return points


def grid(search: dict[str, dict]) -> list[dict]:
    """All combinations of the choices.

    Raises:
        ConfigError: a setting has a range and not a choice.
    """
    for name, domain in search.items():
        if "choice" not in domain:
            raise ConfigError(
                f"search.{name}: expected choice: [...] for algorithm 'grid', got {domain!r}; use 'random' or 'optuna' for ranges"
            )
    values = [domain["choice"] for domain in search.values()]
    if math.prod(map(len, values)) > MAX_GRID:
        raise ConfigError(f"search: expected at most {MAX_GRID} combinations for algorithm 'grid', got {math.prod(map(len, values)):,}")
    return [dict(zip(search, combination, strict=True)) for combination in itertools.product(*values)]


def check_mutable(search: dict[str, dict]) -> None:
    """Refuse what a population cannot change in the middle of a training.

    Raises:
        ConfigError: naming the setting.
    """
    for name in SHAPES:
        if name in search:
            raise ConfigError(
                f"search.{name}: cannot be searched with scheduler 'pbt', because it changes the shape of the weights that trials hand on; "
                "take it out of the search or use 'asha'"
            )


def _domains(values: dict) -> list[tuple[str, Any]]:
    found = []
    for name, domain in values.items():
        is_section = f"{name}." in SEARCHED and isinstance(domain, dict)
        found += [(f"{name}.{inner}", value) for inner, value in domain.items()] if is_section else [(str(name), domain)]
    return found


def _bounds(name: str, kind: str, bounds: Any) -> list:
    if kind == "choice":
        if not isinstance(bounds, list) or not bounds:
            raise ConfigError(f"search.{name}: expected choice: [one or more values], got {bounds!r}")
        return bounds
    try:
        low, high = (int(bound) if kind == "randint" else float(bound) for bound in bounds)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        raise ConfigError(f"search.{name}: expected {kind}: [low, high], got {bounds!r}") from None
    if not low < high or (kind == "loguniform" and low <= 0):
        order = "0 < low < high" if kind == "loguniform" else "low < high"
        raise ConfigError(f"search.{name}: expected {kind}: [low, high] with {order}, got {bounds!r}")
    return [low, high]


def _check_value(name: str, value: Any) -> None:
    """Refuse an unknown name or a wrong type; whether values go together shows only when all are drawn."""
    section, _, field = name.partition(".")
    hints = typing.get_type_hints(typing.get_type_hints(TrainConfig)[section])
    fields = [(known, hint, dataclasses.field(default=None)) for known, hint in hints.items()]
    config.from_dict(dataclasses.make_dataclass(section, fields), {field: value}, where=f"search.{section}")


def with_choice(settings: TrainConfig, choice: dict) -> TrainConfig:
    """Settings with some replaced by dotted name.

    Raises:
        ConfigError: the values do not go together.
    """
    values = config.to_dict(settings)
    for name, value in choice.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = config.merge(values, nested)
    try:
        return config.from_dict(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"search: {error}") from None


def value_of(settings: TrainConfig, name: str) -> Any:
    """A setting by dotted name."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value
