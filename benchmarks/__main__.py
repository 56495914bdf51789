"""Run the quick measurements one after another, each in its own process so that none warms up another.

    python -m benchmarks            # minutes; small data
    python -m benchmarks --full     # an hour: what the README shows

``python -m benchmarks.peers`` installs what we compare with, once. ``summary`` puts what concerns the loader into one
table beside the goals.
"""

from __future__ import annotations

import subprocess
import sys

QUICK = ("loader", "startup", "mixing", "remote", "summary", "conversion", "training_overhead")
HAVE_FULL = {"loader", "conversion", "training_overhead"}

for name in QUICK:
    options = ["--full"] if "--full" in sys.argv[1:] and name in HAVE_FULL else []
    print(f"\n$ python -m benchmarks.{' '.join([name, *options])}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)
