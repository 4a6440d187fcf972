"""From one GPU node to three under load and back to one, with logical GPUs and Ray's own autoscaler; no request fails."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serving" / "elastic.py"


@pytest.mark.slow
def test_nodes_come_and_go_with_the_load(planted_bundle, tmp_path):
    specification = importlib.util.spec_from_file_location("elastic", BENCHMARK)
    elastic = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(elastic)
    found = elastic.run(planted_bundle, [f"user-{user}" for user in range(180)], clients=16, load_s=75.0, nodes=3)
    assert [bar for bar in found["bars"] if not bar["met"]] == [], json.dumps(found["rows"])
    assert found["figures"]["requests"] > 1000 and found["rows"][0]["gpu_nodes"] == 1
    elastic.plot(found, str(tmp_path / "elastic.png"))
    assert (tmp_path / "elastic.png").stat().st_size > 10_000
