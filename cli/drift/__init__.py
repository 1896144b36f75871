"""`trueup drift`: drift reports and the review queue."""
