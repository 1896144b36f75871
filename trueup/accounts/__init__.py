"""Who has what: users, subscriptions, plans, grants and their periods."""
