"""Finds drifts, explains them and decides what becomes of each: pure, without a connection of its own."""
