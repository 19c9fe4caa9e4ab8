"""lm-eval configurations of tasks without a task file: plain text, and prompts to continue."""

from __future__ import annotations

from typing import Any, Final

import datasets  # type: ignore[import-untyped]  # published without types

from objectives.entries import PromptEntry, TextEntry

PROMPT_TASK: Final = "prompt"  # name of the task that prompts make


def text_task(entry: TextEntry) -> dict[str, Any]:
    """Return the configuration of a perplexity task on text files."""
    return {
        "task": entry.name,
        "dataset_path": "text",
        "dataset_kwargs": {
            "data_files": {"test": [str(file) for file in entry.text]},
            "sample_by": entry.unit,
        },
        "test_split": "test",
        "process_docs": _not_blank,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }


def prompt_task(entry: PromptEntry) -> dict[str, Any]:
    """Return the configuration of a generation task without targets."""
    rows = [{"prompt": prompt} for prompt in entry.prompts]
    return {
        "task": PROMPT_TASK,
        "custom_dataset": lambda: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "max_gen_toks": entry.max_tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


# Its source is part of the items' ``rules`` hash: a change refuses the runs made before it.
def _not_blank(documents: datasets.Dataset) -> datasets.Dataset:
    return documents.filter(lambda document: bool(document["text"].strip()))
