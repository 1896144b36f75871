"""The names of all faults and behaviours in a round, and the times that determine when they happen."""

# In the order in which rounds draw them. Each is drawn once before any is drawn again.
TIMED_KINDS = (
    "child_killed",
    "child_killed_in_call",
    "child_killed_after_charge",
    "child_killed_while_sending",
    "worker_killed",
    "worker_killed_after_charge",
    "child_stopped",
    "child_stopped_past_lease",
    "child_stopped_past_hold",
    "child_stopped_while_sending",
    "worker_stopped",
    "redis_restarted",
    "redis_killed",
    "redis_flushed",
    "redis_connections_cut",
    "postgres_restarted",
    "database_sessions_cut",
    "database_sessions_cut_after_charge",
    "database_sessions_cut_while_sending",
    "functions_replaced",
)
LONG_KINDS = (
    "child_stopped_past_lease",
    "child_stopped_while_sending",
    "worker_killed",
    "worker_killed_after_charge",
)
# Each may lose a message on its way from the queue to a worker.
REDIS_KINDS = ("redis_restarted", "redis_killed", "redis_flushed", "redis_connections_cut")
# These hold for the whole round.
STANDING_KINDS = ("duplicate_delivery", "clock_skewed")
KINDS = TIMED_KINDS + STANDING_KINDS

GOOD = ("ok", "slow")
# How the provider fails a call, with the answer requested at once or in chunks.
_CALL_KINDS = (
    "http_500",
    "http_429",
    "timeout",
    "broken_before",
    "broken_after",
    "overbilled",
    "no_usage",
    "not_json",
)
COMPLETE_KINDS = (*_CALL_KINDS, "broken_body")
BREAKING_KINDS = ("stream_broken", "stream_broken_unseen", "stream_stalled")
STREAM_KINDS = (*_CALL_KINDS, *BREAKING_KINDS, "stream_usage_lost", "stream_long")
PROVIDER_KINDS = (*_CALL_KINDS, "broken_body", *STREAM_KINDS[len(_CALL_KINDS) :])

# How Instagram fails a message. With the first three it did not accept the message.
GRAPH_KINDS = (
    "graph_500",
    "graph_429",
    "graph_broken_before",
    "graph_broken_after",
    "graph_broken_body",
    "graph_504",
    "graph_timeout",
)

FAULTS_PER_ROUND = 8
WINDOW_SECONDS = 4.0
# A message that waits for another attempt's lease waits for less than the visibility timeout, as in any deployment.
# Otherwise it would be delivered again and again while it waits.
VISIBILITY_SECONDS = 4
LEASE_MARGIN_SECONDS = 1.5
# A hold lives this long without a heartbeat: longer than any stop of a process. A body that works for WORK_SECONDS
# between two calls loses its hold, unless the heartbeat of its process renews it.
HOLD_TTL_SECONDS = 8
WORK_SECONDS = 9.5
SKEWS_SECONDS = (-3600.0, -20.0, -4.0, 4.0, 8.0)
DUPLICATES_PER_ROUND = 4

# A streaming task that closes its stream early, or leaves it open, reads this many chunks.
CHUNKS_READ = 3
