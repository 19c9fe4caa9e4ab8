"""Output of a run: terminal, JSON lines, report, model card, upload."""
