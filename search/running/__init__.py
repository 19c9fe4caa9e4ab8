"""The loop: ask, build, evaluate, race, tell; then select, test and export."""
