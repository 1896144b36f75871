"""The makers' wire formats: what a request may cost, how its answer is capped, and what the answer reports."""
