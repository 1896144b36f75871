"""Leases of a second and a half, for a worker that loads this with `-I tests.support.short_leases`."""

import trueup.settings.settings

# Beside the model's time-out, which the test sets to half a second.
MARGIN_SECONDS = 1
trueup.settings.settings.LEASE_MARGIN_SECONDS = MARGIN_SECONDS  # type: ignore[assignment]
