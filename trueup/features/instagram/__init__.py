"""Answers to Instagram comments: what to say, and sending it at most once."""
