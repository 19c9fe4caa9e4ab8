"""Evaluate a model as lm-eval's ``HFLM`` does, in less time.

``forward`` runs forward passes with the shortcuts that are on · ``token_tree`` finds shared
prefixes · ``loglikelihood`` scores continuations · ``decoding`` generates text greedily, in the
key-value cache of ``slots`` · ``nan_watch`` detects NaN logits · ``batch_size`` chooses the batch
size · ``fast_hflm`` has lm-eval's interface · ``vllm_engine`` generates text with vLLM instead ·
``agreement`` decides which shortcuts reproduce ``HFLM`` on a model.
"""
