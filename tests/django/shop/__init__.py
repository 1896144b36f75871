"""A Django app with models of its own names."""
