"""Ask for recipes, race them, choose the winner and report it: the only package users run."""
