"""docs/scale.md says what `raysys plan` and the measured constants say today."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
WRITE_DOC = runpy.run_path(str(ROOT / "benchmarks" / "scale" / "write_doc.py"))
TEXT = (ROOT / "docs" / "scale.md").read_text()


def test_the_page_is_what_its_command_prints():
    assert WRITE_DOC["render"](TEXT) == TEXT, "run benchmarks/scale/write_doc.py"


def test_a_changed_figure_would_be_seen():
    """The comparison above would pass on a page without blocks."""
    blocks = WRITE_DOC["BLOCK"].findall(TEXT)
    assert [name for _, name, _ in blocks] == ["constants", "checks", "predictions"]
    wrong = TEXT.replace("| train: nodes | ", "| train: nodes | 1", 1)
    assert wrong != TEXT and WRITE_DOC["render"](wrong) == TEXT
