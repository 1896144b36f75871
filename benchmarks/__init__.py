"""Benchmarks of speed, as ratios within one run, because machines differ: `python -m benchmarks.admission`."""
