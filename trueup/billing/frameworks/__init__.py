"""Web frameworks: how each gives the user of a request and takes a refusal."""
