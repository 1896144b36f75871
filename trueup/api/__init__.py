"""The HTTP surface: views for the numbers, endpoints for AI work, both for the token's own user alone."""
