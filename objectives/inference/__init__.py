"""Evaluate a model as lm-eval's ``HFLM`` does, in less time.

``token_tree`` shared beginnings of sequences · ``forward`` passes, with the shortcuts that are on ·
``loglikelihood`` and greedy ``decoding`` by these passes, texts written in ``slots`` ·
``nan_watch`` refuses logits that are no numbers · ``fast_hflm`` lm-eval's interface to both ·
``vllm_engine`` writes texts in the live model's place · ``agreement`` decides which shortcuts
reproduce ``HFLM`` on a model.
"""
