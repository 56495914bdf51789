"""Measurements, one file each; ``python -m benchmarks`` runs the quick ones in turn. Results also go to results/*.json."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
