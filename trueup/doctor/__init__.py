"""`trueup doctor`: is everything in place for budgets to be true? Each finding says what is so, and what to do.

Checks only look. One that fails is a finding itself, and hides no other.
"""
