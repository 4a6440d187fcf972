"""Settings from YAML and `--set`."""

from dataclasses import dataclass

import pytest

from raysys import config
from raysys.errors import ConfigError
from raysys.prepare.config import PrepareConfig


@dataclass(frozen=True)
class Shape:
    width: int = 1
    rate: float = 0.1
    name: str = "a"


@pytest.mark.parametrize("text", ["2020-01-31", "'2020-01-31'"])
def test_dates_stay_text(text, tmp_path):
    """YAML turns an unquoted date into an object; the setting is text."""
    (tmp_path / "prepare.yaml").write_text(f"min_timestamp: {text}\n")
    assert config.load(PrepareConfig, str(tmp_path / "prepare.yaml")).min_timestamp == "2020-01-31"
    assert config.load(PrepareConfig, None, [f"min_timestamp={text}"]).min_timestamp == "2020-01-31"


def test_numbers_that_yaml_reads_as_text():
    assert config.load(Shape, None, ["rate=1e-3"]).rate == 0.001


@pytest.mark.parametrize(
    "pair, message",
    [
        ("widht=2", "did you mean 'width'"),
        ("width=wide", "width: expected int"),
        ("width=true", "width: expected int"),
        ("width", "expects key=value"),
    ],
)
def test_what_is_wrong_is_named(pair, message):
    with pytest.raises(ConfigError, match=message):
        config.load(Shape, None, [pair])
