"""The offline provider: made-up answers for demos, trials and tests, without a network or a key."""
