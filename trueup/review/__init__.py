"""A person's decisions on drifts that are not corrected by themselves."""
