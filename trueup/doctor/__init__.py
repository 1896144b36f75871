"""`trueup doctor` checks everything that budgets depend on. Each finding names a fact and, if needed, a remedy.

Checks write nothing. A check that fails becomes a finding, and the other checks still run.
"""
