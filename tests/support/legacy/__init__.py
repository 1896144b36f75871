"""Legacy hosts made up from a seed, with every way a counter goes wrong, and the truth about each kept aside.

`timeline` plays one subscription's life as the host's code would live it. `usage` scripts ordinary life, `injections`
the causes, `coincidences` what only looks like one; `population` mixes them, `loading` puts them into a database,
`judging` compares what reconciliation said with the truth. `live_host` is a host at work, a process of its own.

The description of such hosts is all that this was written from: nothing here looks at how reconciliation finds causes.
"""
