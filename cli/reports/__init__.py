"""Drift reports in every format: what `trueup drift report` and `trueup drift history` write."""
