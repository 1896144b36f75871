"""Legacy hosts generated from a seed, with every way in which a counter goes wrong, and the truth about each.

`timeline` plays one subscription's life as the host's code would. `usage` scripts ordinary use, `injections` the
causes, `coincidences` the events that only look like a cause. `population` mixes them, `loading` writes them to a
database, `judging` compares the result of reconciliation with the truth. `live_host` is a working host in its own
process.

All of this was written from the description of such hosts alone, without a look at how reconciliation finds causes.
"""
