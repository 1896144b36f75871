"""`trueup drift`: reports, the review queue, the preview that only reads."""
