"""`raysys compress` for `ray job submit --working-dir . -- python jobs/compress.py ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a submitted job has the checkout, not an installed package

from raysys.cli import main  # noqa: E402

sys.exit(main(["compress", *sys.argv[1:]]))
