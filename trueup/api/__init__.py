"""The HTTP API: views of a user's figures and endpoints for AI tasks, each for the token's own user only."""

from trueup.extras import require_extra

# Check the extra here, before the modules of this package import its dependencies.
require_extra("api", "trueup.api")
