"""The HTTP surface: views for the numbers, endpoints for AI work, both for the token's own user alone."""

from trueup.extras import require_extra

# Here, before the modules of this package import what the extra brings.
require_extra("api", "trueup.api")
