"""Mutation checks: change the gate and the charge in one place at a time, and see a test fail.

`python -m tests.mutations` makes the mutants of the SQL functions (`sql_mutants.py`) and of the Python beside them
(`python_mutants.py`), and runs the guarding tests on each of them (`guard.py`). A mutant that no test
kills shows a missing test or redundant code, or is equivalent: `equivalents.toml` lists these with the reason.
"""
