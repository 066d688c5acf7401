"""The name that ``python -m editloss_core.run_report`` had before 0.1.0; it goes with 0.3 (CONTRIBUTING.md, Deprecations)."""

import sys

from ..run_report.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
