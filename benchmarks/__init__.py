"""Speed, as ratios within one run, for machines are noisy: `python -m benchmarks.admission`, `….guarded_task`."""
