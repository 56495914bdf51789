"""Measurements, one file each; ``python -m benchmarks`` runs the quick ones in turn. Results go to results/ too."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
