"""Answers to Instagram comments: write the message, and send it at most once."""
