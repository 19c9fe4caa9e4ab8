"""Recipes: their data model, mergekit's YAML in and out, parameter values by tensor."""
