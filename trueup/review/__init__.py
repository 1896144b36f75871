"""Decisions of people about drifts that trueup does not correct by itself."""
