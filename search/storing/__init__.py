"""What survives a kill: run folder, database, trials, items, results."""
