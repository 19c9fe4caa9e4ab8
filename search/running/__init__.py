"""The loop: ask, build, evaluate, race, tell; then choose, test and export."""
