"""Finds drifts, explains their causes and decides which may be corrected."""
