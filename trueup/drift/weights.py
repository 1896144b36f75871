"""The weights of the cause engine: every cost, threshold and bound, with its source.

A cost says how improbable an assumption is. The explanation with the lowest sum of costs wins; another one within
`CLOSE` of it makes it less certain. Each number has one of these sources:

- calibrated: chosen so that tests/drift/test_explain.py, which generates hosts with known causes (single and in pairs),
  finds at least 99.9 % of single causes and 95 % of pairs named correctly, and no wrong cause called certain. Run that
  test after a change, also its long case.
- habit: the behaviour of hosts and people, as the specification describes its legacy host.
- bound: it limits the search or the output, not the judgement.
"""

from datetime import timedelta

# Purchases. A host that sells tokens adds them to the counter: no cost (habit). A purchase just before the base point
# is equally likely to be in the counter already (calibrated).
PURCHASE_USED = 0.0
PURCHASE_UNUSED = 1.0
SETTLED_PURCHASE_USED = 1.0
SETTLED_PURCHASE_UNUSED = 0.0
# The rest is as large as a payment whose tokens the figures or the explanation have already (calibrated).
CREDITED_TWICE = 3.0
# Payments are not mapped, and the rest has the size of a plan (calibrated).
UNSEEN_PURCHASE = 3.0
# A grant that the counter did not follow (calibrated).
GRANT_NOT_IN_COUNTER = 1.0

# Tokens that an upgrade kept (habit: an upgrade keeps them, a renewal of the same plan seldom does). An earlier plan
# costs more the older it is, and more if it had ended; a guessed plan size costs most (calibrated).
CARRIED_GUESSED = 2.6
CARRIED_SAME_PLAN = 2.4
CARRIED_EARLIER_PLAN = 0.4
CARRIED_ENDED_PLAN = 2.0
NOT_CARRIED = 1.5

# A log row and a decrement on different sides of the base point (calibrated): the decrement came late, or early.
DECREMENT_AFTER_BASE = 1.5
DECREMENT_BEFORE_BASE = 3.0
# A single log row just before the base point; a log row whose decrement the last correction waited for (calibrated).
LOG_ROW_BEFORE_BASE = 3.0
AWAITED_LOG_ROW = 0.5
LONE_DECREMENT_BEFORE_BASE = 3.0
# Rows whose match may still arrive (calibrated).
YOUNG_LOG_ROW_UNUSED = 0.5
YOUNG_DECREMENT = 0.2
# The host wrote the old figure back over a correction (calibrated).
OVERWRITTEN_CORRECTION = 2.0

# Lost updates (calibrated); each further one costs less than the first, up to a limit.
LOST_UPDATE = 2.0
FURTHER_LOST_UPDATE = 0.5
MAX_LOST_UPDATES = 5.0
# The highest probability that a manual edit matches one of the tried sums by chance (calibrated).
MAX_CHANCE = 0.01
# A manual edit gives 50 to 50,000 tokens; 50 to 100 is as likely as 25,000 to 50,000 (habit).
GIVEN_FROM, GIVEN_TO = 50, 50_000

# A host that stops at zero (calibrated) lets only few more requests pass, those already on their way. Or it does not
# stop at zero.
NO_CLAMP = 1.5
REQUEST_ON_ITS_WAY = 0.8
REQUEST_LET_THROUGH = 2.0
MAX_BELOW_ZERO = 8.0
EDIT_AFTER_CLAMP = 4.0
ON_ITS_WAY = timedelta(seconds=10)

# A manual edit explains every drift, so it costs most (calibrated), and more for each digit beyond two: people type
# round figures (habit).
MANUAL_EDIT = 8.0
MANUAL_EDIT_DIGIT = 0.5
ROUND_FIGURE = 100

# By amounts alone: a log row of the size that a purchase leaves unexplained (calibrated).
AMOUNT_OF_A_ROW = 2.0

# Another explanation this close to the best one fits as well (calibrated).
CLOSE = 3.0
# With fewer log rows, missing decrement rows do not show how the host works (calibrated).
MIN_LOGGED_ROWS = 20
# A row gets its time before its commit: a comparison may miss a row this recent (habit).
JUST_BEFORE = timedelta(seconds=2)

# Bounds of the search: candidates tried as used and unused, by rows and by amounts; purchases before the base point;
# sizes of carried-over tokens; lost updates whose sums are tried.
MAX_POSSIBLE = 8
MAX_CREDITS = 6
MAX_SETTLED_PURCHASES = 3
MAX_CARRIED = 24
MAX_CONCURRENT = 60
# Rows shown for one cause; `count` is their whole number.
MAX_ROWS = 8
MAX_ROWS_BELOW_ZERO = 4
