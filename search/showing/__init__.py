"""For people and programs: terminal, JSON lines, report, model card, upload."""
