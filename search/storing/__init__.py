"""Everything a run keeps on disk: run folder, database, trials, items, results."""
