"""What tests of mapped hosts share: the type of the fixture `remap`, and rules without an age."""

from collections.abc import Callable

from trueup.host.mapping import HostMapping
from trueup.settings.policies import Rules

Remap = Callable[..., HostMapping]
"""Takes settings of `[host]` and statements of the host's, sets the database up, and returns the mapping."""

NO_AGE = Rules(min_age_seconds=0)
"""Without it, a run would take the usage that a test has just logged for usage in flight."""
