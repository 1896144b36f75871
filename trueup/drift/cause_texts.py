"""Causes and actions in words that an operator understands: one sentence each, for reports and `drift explain`."""

CAUSES: dict[str, str] = {
    "missed_decrement": "usage was logged, but never taken off the counter",
    "lost_update": "two decrements ran at the same moment, and the counter kept only one of them",
    "double_decrement": "one log row was taken off the counter twice, as a retried task does",
    "charged_not_logged": "tokens were taken off the counter, but no usage was logged for them",
    "failed_usage_charged": "a failed request was taken off the counter, though it does not count",
    "clamped_at_zero": "the last request cost more than the counter held, and the counter stopped at zero",
    "credit_without_grant": "the counter was raised by a purchase that the plan's tokens do not know of",
    "renewal_without_new_window": "a renewal added the plan's tokens, but the window did not begin anew",
    "carried_over_tokens": "an upgrade began a new window and kept what was left of the old one",
    "grant_not_in_counter": "a grant came or went, and the counter did not follow",
    "burned_at_expiry": "the subscription ended, and the counter was set to zero",
    "manual_edit": "someone set the counter by hand",
    "counter_null": "the counter is empty",
    "counter_negative": "the counter is below zero",
    "counter_out_of_range": "what remains is more than the counter's column can hold",
    "unexplained": "no row of the log, of the decrements or of the payments explains it",
}

ACTIONS: dict[str, str] = {
    "corrected": "the counter was set right",
    "reported": "only reported, the counter was left alone",
    "review": "left for a person: `trueup drift review`",
    "lost_race": "the host wrote the counter at the same moment; the next run looks again",
    "waiting": "so young that its decrement may still come; the next run looks again",
    "tolerated": "within the tolerance, the counter was left alone",
    "ignored": "a person decided to leave it as it is",
}

CERTAINTIES: dict[str, str] = {
    "certain": "the rows prove it, and nothing else fits",
    "likely": "the rows fit it best",
    "possible": "the rows allow it, and other causes too",
}


def cause_title(cause: str) -> str:
    """Return a cause's name, or a combination's, as people read it."""
    return cause.replace("_", " ").replace("+", " + ")


def cause_sentence(cause: str) -> str:
    """Return what a cause means; its own name if there are no words for it."""
    return CAUSES.get(cause, cause_title(cause))
