"""The mapping onto the host's tables."""
