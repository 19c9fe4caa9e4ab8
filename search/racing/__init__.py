"""How many items a candidate is evaluated on, and who is ahead: pure functions of scores."""
