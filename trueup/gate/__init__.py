"""The gate: the decision whether a task may run, holds, provider calls, and the mode of each feature."""
