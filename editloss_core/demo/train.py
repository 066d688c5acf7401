"""The name that ``benchmarks/demo_model/train_small_kontext.py`` had before 0.1.0, in a clone of the repository; it goes with 0.3
(CONTRIBUTING.md, Deprecations)."""

import logging
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "demo_model" / "train_small_kontext.py"

if __name__ == "__main__":
    if not PROGRAM.is_file():
        sys.exit(f"{PROGRAM.name} is in a clone of the repository, under benchmarks/demo_model")
    sys.path.insert(0, str(PROGRAM.parent))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from train_small_kontext import main

    main()
