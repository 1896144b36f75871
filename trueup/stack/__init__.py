"""The embedded stack: PostgreSQL and Redis for users who have set up neither.

`running_stack` starts the servers for a block of code. `supervisor.run_stack` is the core of `trueup up`.
"""

from trueup.stack.running import BOTH, Service, StackUrls, require_database, running_stack

__all__ = ["BOTH", "Service", "StackUrls", "require_database", "running_stack"]
