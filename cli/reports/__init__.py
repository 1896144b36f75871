"""Drift reports in every format."""
