"""Cases are made as in tests/ops, whose modules are imported by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "ops"))
