"""Run the quick measurements one after another, each in its own process so that none warms up another."""

from __future__ import annotations

import subprocess
import sys

QUICK = ("loader", "startup", "conversion", "training_overhead")

for name in QUICK:
    print(f"\n$ python -m benchmarks.{name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
