"""Run the quick measurements one after another, each in its own process so that none warms up another.

    python -m benchmarks            # minutes; the loader on 80 MB
    python -m benchmarks --full     # the loader on 819 MB

``python -m benchmarks.peers`` installs the loaders we compare with, once. ``summary`` puts what concerns the loader
into one table beside the goals.
"""

from __future__ import annotations

import subprocess
import sys

QUICK = ("loader", "startup", "mixing", "remote", "summary", "conversion", "training_overhead")

for name in QUICK:
    options = ["--full"] if "--full" in sys.argv[1:] and name == "loader" else []
    print(f"\n$ python -m benchmarks.{' '.join([name, *options])}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)
