"""Reconcile runs over all counters: shards, batches, corrections."""
