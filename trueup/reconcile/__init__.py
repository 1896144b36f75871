"""Runs over all counters: shards, batches, corrections."""
