"""The weights that the cause engine decides by: every cost, threshold and bound, with where it comes from.

A cost says how much an assumption strains belief; the explanation with the lowest sum of costs wins, and another one
within `CLOSE` of it makes it less certain. Each number has one of these sources:

- calibrated: chosen so that tests/drift/test_explain.py, which judges made-up hosts (each cause singly and in pairs)
  by what was really done, finds at least 99.9 % of single causes and 95 % of pairs named right, and nothing wrong that
  is called certain. Run that test after a change, also with a larger EXPLANATIONS_SUBSCRIPTIONS and another seed.
- habit: what hosts and people do, as the specification describes its legacy host.
- bound: it limits what is searched or shown, not what is believed.
"""

from datetime import timedelta

# Purchases. A host that sells tokens adds them to the counter: that costs nothing (habit). Just before the base point
# a purchase is as likely in the counter already (calibrated).
PURCHASE_USED = 0.0
PURCHASE_UNUSED = 1.0
SETTLED_PURCHASE_USED = 1.0
SETTLED_PURCHASE_UNUSED = 0.0
# Payments are not mapped, and the rest is as large as a plan (calibrated).
UNSEEN_PURCHASE = 3.0
# A grant that the counter did not follow (calibrated).
GRANT_NOT_IN_COUNTER = 1.0

# Tokens that an upgrade kept (habit: an upgrade keeps them, the renewal of the same plan seldom does). An earlier plan
# costs more the further back it is, and one whose size is guessed costs most (calibrated).
CARRIED_GUESSED = 2.6
CARRIED_SAME_PLAN = 2.4
CARRIED_EARLIER_PLAN = 0.4
NOT_CARRIED = 1.5

# A log row and a decrement on different sides of the base point (calibrated): the decrement came late, or early.
DECREMENT_AFTER_BASE = 1.5
DECREMENT_BEFORE_BASE = 3.0
# A log row alone just before the base point; one whose decrement the last correction waited for (calibrated).
LOG_ROW_BEFORE_BASE = 3.0
AWAITED_LOG_ROW = 0.5
LONE_DECREMENT_BEFORE_BASE = 3.0
# Rows that are too young to tell (calibrated).
YOUNG_LOG_ROW_UNUSED = 0.5
YOUNG_DECREMENT = 0.2
# The host wrote the old figure back over a correction (calibrated).
OVERWRITTEN_CORRECTION = 2.0

# Lost updates (calibrated); each further one costs less than the first, up to a limit.
LOST_UPDATE = 2.0
FURTHER_LOST_UPDATE = 0.5
MAX_LOST_UPDATES = 5.0
# An edit by hand meets one of the sums that are tried by chance: at most with this probability (calibrated).
MAX_CHANCE = 0.01
# A hand gives 50 to 50,000 tokens, as likely from 50 to 100 as from 25,000 to 50,000 (habit).
GIVEN_FROM, GIVEN_TO = 50, 50_000

# A host that stops at zero (calibrated): it shows nothing left and lets few more requests through, those that were on
# their way. Or it does not stop there.
NO_CLAMP = 1.5
REQUEST_ON_ITS_WAY = 0.8
REQUEST_LET_THROUGH = 2.0
MAX_BELOW_ZERO = 8.0
EDIT_AFTER_CLAMP = 4.0
ON_ITS_WAY = timedelta(seconds=10)

# An edit by hand explains everything, so it costs most (calibrated); and more with each digit beyond two, for people
# type round figures (habit).
MANUAL_EDIT = 8.0
MANUAL_EDIT_DIGIT = 0.5
ROUND_FIGURE = 100

# By amounts alone: a log row of the size of what a purchase leaves over (calibrated).
AMOUNT_OF_A_ROW = 2.0

# Another explanation this close to the best one fits as well (calibrated).
CLOSE = 3.0
# With fewer log rows, decrement rows that are missing say nothing of the host (calibrated).
MIN_LOGGED_ROWS = 20
# A row is dated, then committed: for so long a look at the counter may have missed it (habit).
JUST_BEFORE = timedelta(seconds=2)

# Bounds of the search: candidates that are tried both ways, by rows and by amounts; purchases before the base point;
# sizes of what was kept; lost updates whose sums are tried.
MAX_POSSIBLE = 8
MAX_CREDITS = 6
MAX_SETTLED_PURCHASES = 3
MAX_CARRIED = 24
MAX_CONCURRENT = 60
# Rows shown for one cause; `count` says how many there are.
MAX_ROWS = 8
MAX_ROWS_BELOW_ZERO = 4
