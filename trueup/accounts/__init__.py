"""Accounts: users, subscriptions, plans, grants and their periods."""
