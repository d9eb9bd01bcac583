"""Run every benchmark in its own process, one after the other."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    names = sys.argv[1:] or [
        module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if not module.name.startswith("_")
    ]
    sys.exit(max(subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode for name in names))
