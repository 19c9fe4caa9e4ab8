"""The commands, one function each, by their names on the command line."""
