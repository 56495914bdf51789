"""Run the quick measurements one after another, each in its own process so that none warms up another.

    python -m benchmarks            # minutes; small data
    python -m benchmarks --full     # an hour: what docs/benchmarks.md shows

``python -m benchmarks.peers`` installs what we compare with, once. ``summary`` puts what concerns the loader into one
table beside the goals.
"""

from __future__ import annotations

import subprocess
import sys

QUICK = ("loader", "startup", "mixing", "remote", "summary", "conversion", "memory", "training_overhead")
FULL = {"loader": ["--full"], "conversion": ["--full"], "memory": ["--size", "128MB"], "training_overhead": ["--full"]}
SMALL = {"memory": ["--size", "16MB"]}

for name in QUICK:
    options = (FULL if "--full" in sys.argv[1:] else SMALL).get(name, [])
    print(f"\n$ python -m benchmarks.{' '.join([name, *options])}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)
