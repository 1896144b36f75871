"""Recorded usage: charges, the usage log, the outbox."""
