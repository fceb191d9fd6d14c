"""Makes `benchmarks`, which is not installed, importable; this directory must not become a package of that name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
