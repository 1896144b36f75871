"""All settings, their sources and their checks."""
