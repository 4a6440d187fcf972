import base64
import copy
import html.parser
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from raysys.evaluate import metrics
from raysys.evaluate.report import render, write_report

KS = (1, 5, 10, 200)


def stage(seed, resamples=50):
    ranks = np.random.default_rng(seed).integers(0, 60, 200)
    return metrics.mean_with_intervals(metrics.rank_metrics(ranks, KS), np.arange(200), resamples=resamples)


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    probabilities = rng.random(500)
    curve = metrics.reliability(probabilities, rng.random(500) < probabilities)
    tenths = [0.1] * 10
    return {
        "final": stage(0),
        "retrieval": stage(1),
        "sources": {"interest": {**stage(2), "fusion_weight": 0.7}, "dot_product": {**stage(3), "fusion_weight": 0.0}},
        "baselines": {},
        "final_minus_retrieval": {"ndcg@10": 0.0021, "ndcg@10_interval": [0.0003, 0.0039]},
        "unmasked": {"final": stage(4, 0), "retrieval": stage(5, 0)},
        "ranker": {
            "auc": 0.812345,
            "logloss": 0.3,
            "ece": 0.0123,
            "label": "positive event",
            "negatives": "logged events that are not positive",
            "examples": 500,
            "base_rate": 0.5,
            "logloss_of_base_rate": 0.69,
            "reliability": curve,
        },
        "coverage": 0.4125,
        "novelty": 11.2,
        "popularity_bias": {
            "mean_percentile": 0.9,
            "mean_percentile_of_targets": None,
            "gini": 0.8,
            "share_by_tenth": {"recommended": tenths, "targets": tenths, "training": tenths},
        },
        "list_k": 10,
        "split": "test",
        "masked": True,
        "k": list(KS),
        "num_candidates": 200,
        "ranker_weight": 0.5,
        "users": 200,
        "targets": 200,
        "unknown_targets": 3,
        "repeated_targets": 0,
        "empty_histories": 0,
        "items": 1234,
        "data": {"fingerprint": "<b>&", "split": "leave-one-out", "time": "ordinal"},
        "model": {"version": "20260901T1200-abc", "fit": "train", "data": "abc"},
        "seed": 0,
        "bootstrap": 50,
        "seconds": 1.0,
    }


class TagCounter(html.parser.HTMLParser):
    """Counts tags and fails on a closing tag that closes nothing."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.counts = [], {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(document):
    counter = TagCounter()
    counter.feed(document)
    assert counter.open == []
    return counter.counts


def test_the_report_is_one_self_contained_file(result, tmp_path):
    path = tmp_path / "sub" / "report.html"
    write_report(result, str(path))
    document = path.read_text()
    counts = parse(document)
    assert counts["img"] == 4
    assert not re.search(r"(src|href)=['\"](?!data:)", document) and "<script" not in document and "url(" not in document
    for image in re.findall(r"base64,([A-Za-z0-9+/=]+)", document):
        assert xml.etree.ElementTree.fromstring(base64.b64decode(image)).tag.endswith("svg")


def test_every_stage_has_its_row_with_values_and_intervals(result):
    document = render(result)
    assert parse(document)["tr"] == 1 + 2 + 2 + 1  # head, sources, fused and final, final unmasked
    for figures in (result["final"], result["retrieval"], *result["sources"].values()):
        low, high = figures["ndcg@10_interval"]
        assert f"{figures['ndcg@10']:.4f}<small>{low:.4f}&ndash;{high:.4f}</small>" in document
    assert "weight in fusion 0.7" in document and "not in use" in document
    assert "+0.0021 (95% interval +0.0003 to +0.0039, paired)" in document
    assert "0.8123" in document and "41.2%" in document and "1,234 items" in document


def test_text_from_the_data_is_escaped(result):
    document = render(result)
    assert "&lt;b&gt;&amp;" in document and "<b>&" not in document


def test_null_parts_are_left_out(result):
    bare = copy.deepcopy(result)
    bare["ranker"] = dict.fromkeys(("auc", "logloss", "ece", "label", "negatives"))
    bare["unmasked"] = {}
    bare["ranker_weight"] = 0.0
    bare["k"] = [1, 5]
    for figures in (bare["final"], bare["retrieval"], bare["final_minus_retrieval"], *bare["sources"].values()):
        for name in [name for name in figures if name.endswith("_interval")]:
            del figures[name]
    bare["final_minus_retrieval"]["ndcg@5"] = 0.0
    document = render(bare)
    assert parse(document)["img"] == 3
    assert "No calibrated probabilities" in document and "interval" not in document
    assert "validation gave it no weight" in document


def test_same_figures_same_file(result):
    assert render(result) == render(result)
