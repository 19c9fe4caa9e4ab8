"""What is wanted: study.yaml read, checked once and frozen."""
