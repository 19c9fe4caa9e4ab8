"""Recipes: the model, mergekit's YAML read and written, parameters' values by tensor."""
