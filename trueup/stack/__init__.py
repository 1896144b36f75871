"""The embedded stack: PostgreSQL and Redis for anyone who has set up neither.

`running_stack` lends the servers to a block of code; `supervisor.run_stack` is the core of `trueup
up`.
"""

from trueup.stack.running import BOTH, Service, StackUrls, running_stack

__all__ = ["BOTH", "Service", "StackUrls", "running_stack"]
