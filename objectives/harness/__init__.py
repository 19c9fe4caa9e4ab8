"""lm-eval's tasks as an objective.

``task_index`` names of tasks, found fast · ``tasks`` tasks loaded without a model, from their
files by ``task_factory``, with their ``metrics`` · ``jsonl_task`` a task file for a user's
questions · ``prompts`` lm-eval's requests for every document, once ``encoding`` has tried the
tokenizer · ``judging`` responses to values, in separate processes (``isolation``) ·
``harness`` all of them for one live model, with lm-eval's log kept ``quiet``.
"""
