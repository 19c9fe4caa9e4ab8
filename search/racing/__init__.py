"""Decide how many items to evaluate and which candidate is ahead: pure functions of scores."""
