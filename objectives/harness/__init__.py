"""lm-eval's tasks as an objective.

``harness`` evaluates one live model on tasks, using all of the following · ``task_index`` finds
tasks by name · ``tasks`` loads them without a model · ``task_factory`` builds each from its file ·
``task_code`` finds Python code in task files · ``metrics`` chooses a task's metric · ``jsonl_task``
writes a task file for a user's questions · ``encoding`` tries the tokenizer · ``prompts`` builds
lm-eval's requests · ``judging`` turns responses into values · ``losses`` are differentiable ·
``isolation`` runs code in separate processes · ``quiet`` silences lm-eval's log.
"""
