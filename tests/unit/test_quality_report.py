"""The report of benchmarks/quality: ours by stage, averaged over seeds, beside what others published."""

import json
import runpy
from pathlib import Path

import pytest

from raysys.errors import SchemaError

ROOT = Path(__file__).parents[2]
REPORT = runpy.run_path(str(ROOT / "benchmarks" / "quality" / "report.py"))


def figures(recall, ndcg, **more):
    return {"recall@10": recall, "ndcg@10": ndcg, "recall@200": 0.5, **more}


def run(seed, ndcg, without):
    interval = {"ndcg@10_interval": [ndcg - 0.01, ndcg + 0.01]}
    metrics = {
        "final": figures(0.1, ndcg, **interval),
        "retrieval": figures(0.09, ndcg),
        "sources": {"interest": figures(0.08, ndcg, fusion_weight=0.25 + seed / 2)},
        "left_out": {name: figures(0.05, 0.02) for name in without},
        "union": figures(0.2, 0.1),
        "unmasked": {"final": figures(0.04, 0.01)},
    }
    return {"seed": seed, "seconds": 60.0 + 60 * seed, "peak_bytes": None if seed else 2e9, "metrics": metrics}


def test_means_over_seeds_beside_published_figures(tmp_path):
    bars = [
        {"what": "ndcg@10", "bar": 0.0645, "measured": 0.07, "met": True},
        {"what": "recall@10", "bar": 0.107, "measured": 0.1, "met": False},
    ]
    runs = [run(0, 0.06, ["interest", "covisit"]), run(1, 0.08, ["interest"])]
    about = {"commit": "abc", "date": "2026-01-02T00:00:00"}
    result = {"name": "beauty", "data": "beauty", "config": "defaults", "fit": "train", "runs": runs, "bars": bars, "about": about}
    (tmp_path / "beauty.json").write_text(json.dumps(result))
    page = Path(REPORT["write_report"](str(tmp_path), str(tmp_path / "out"), hardware="toy", date="2026-01-02"))
    text = page.read_text()
    assert page.name == "toy_2026-01-02.md"
    assert "2 seeds, settings: defaults, fit: train; commit abc" in text and "Training 1.5 minutes a seed, peak memory 2.0 GB." in text
    assert "| ndcg@10 | 0.0645 | 0.07 | yes |" in text and "| recall@10 | 0.107 | 0.1 | **no** |" in text
    assert "| raysys, final | 0.1000 | 0.0700 | 0.0500 to 0.0700 | 0.5000 |  |" in text
    assert "| alone: interest | 0.0800 | 0.0700 |  | 0.5000 | 0.50 |" in text
    assert "without: interest" in text and "without: covisit" not in text  # not in every seed's mixture
    assert "| published: ICSRec | 0.0959 | 0.0578 | | | |" in text


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="found none; run `raysys bench quality/run` first"):
        REPORT["write_report"](str(tmp_path), str(tmp_path), hardware="toy", date="2026-01-02")
