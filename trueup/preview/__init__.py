"""A drift report before trueup is attached: it only reads."""
