"""The report of benchmarks/quality: ours by stage, averaged over seeds, beside what others published."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from raysys.errors import SchemaError
from raysys.evaluate import metrics

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


def test_a_refit_stands_beside_nothing_of_another_protocol(tmp_path):
    bars = [{"what": "ndcg@10", "bar": 0.0645, "measured": 0.07, "met": True}]
    about = {"commit": "abc", "date": "2026-01-02T00:00:00"}
    runs = [run(0, 0.06, ["interest"])]
    result = {
        "name": "beauty-refit",
        "data": "beauty",
        "config": "defaults",
        "fit": "train+valid",
        "runs": runs,
        "bars": bars,
        "about": about,
    }
    (tmp_path / "beauty-refit.json").write_text(json.dumps(result))
    text = Path(REPORT["write_report"](str(tmp_path), str(tmp_path / "out"), hardware="toy", date="2026-01-02")).read_text()
    assert "1 seed, settings: defaults, fit: train+valid" in text and "Another protocol" in text and "| raysys, final | 0.1000" in text
    assert "published: " not in text and "| ndcg@10 |" not in text.replace("| recall@10 | ndcg@10 |", "")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="found none; run `raysys bench quality/run` first"):
        REPORT["write_report"](str(tmp_path), str(tmp_path), hardware="toy", date="2026-01-02")


def judged(auc, **more):
    return {"auc": auc, "logloss": 0.6, "ece": 0.01, "auc_interval": [auc - 0.01, auc + 0.01], **more}


def test_the_ranker_stands_beside_its_peers(tmp_path):
    common = {"examples": 9924, "users": 140, "base_rate": 0.56, "learnt": 80000, "watched": 10000}
    runs = [
        {"seed": seed, "who": {"raysys": judged(0.79 + seed / 100), "DIN": judged(0.78, behind_interval=[0.001, 0.02])}, **common}
        for seed in range(2)
    ]
    bars = [{"what": "AUC above DIN", "bar": 0.78, "measured": 0.795, "met": True}]
    about = {"commit": "abc", "date": "2026-01-02T00:00:00"}
    (tmp_path / "r.json").write_text(json.dumps({"name": "r", "kind": "ranker", "runs": runs, "bars": bars, "about": about}))
    text = Path(REPORT["write_report"](str(tmp_path), str(tmp_path / "out"), hardware="toy", date="2026-01-02")).read_text()
    assert "9,924 test events of 140 users, 56.0% liked" in text and "| AUC above DIN | 0.78 | 0.795 | yes |" in text
    assert "| raysys | 0.7950 | 0.7800 to 0.8000 |  | 0.6000 | 0.0100 | 0.7900, 0.8000 |" in text
    assert "| DIN | 0.7800 | 0.7700 to 0.7900 | 0.0010 to 0.0200 | 0.6000 | 0.0100 | 0.7800, 0.7800 |" in text


def test_cold_start_has_a_row_a_question(tmp_path):
    row = {"recall@10": 0.2, "ndcg@10": 0.1, "ndcg@10_interval": [0.05, 0.15], "recall@50": 0.4}
    result = {
        "name": "toy-cold",
        "kind": "cold",
        "seed": 0,
        "items": {"hidden": 168, "users": 904, "who": {"raysys, among all": row}},
        "users": {"users": 943, "who": {"0": {"popularity": row}}},
        "about": {"commit": "abc", "date": "2026-01-02T00:00:00"},
    }
    (tmp_path / "toy-cold.json").write_text(json.dumps(result))
    text = Path(REPORT["write_report"](str(tmp_path), str(tmp_path / "out"), hardware="toy", date="2026-01-02")).read_text()
    assert "## Cold start: toy" in text and "168 items lost all their events" in text
    assert "| hidden items | raysys, among all | 0.2000 | 0.1000 | 0.0500 to 0.1500 | 0.4000 |" in text
    assert "| 0 events | popularity | 0.2000 | 0.1000 | 0.0500 to 0.1500 | 0.4000 |" in text


def test_an_auc_of_resampled_users_is_that_of_their_repeated_events():
    ranker = runpy.run_path(str(ROOT / "benchmarks" / "quality" / "ranker.py"))
    rng = np.random.default_rng(0)
    scores, liked, users = rng.integers(0, 20, 200) / 20, rng.random(200) < 0.5, rng.integers(0, 10, 200)
    draw = np.array([0, 2, 1, 1, 3, 0, 1, 1, 1, 0])
    repeated = np.repeat(np.arange(200), draw[users])
    found = ranker["weighted_aucs"](scores, liked, users, np.stack([np.ones(10, int), draw]))
    assert found == pytest.approx([metrics.auc(scores, liked), metrics.auc(scores[repeated], liked[repeated])])
