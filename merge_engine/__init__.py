"""Turn a recipe and its donors into weights. Knows nothing of scores.

``recipe`` mergekit's YAML, both ways · ``parameters`` a setting to a number per tensor ·
``methods`` one table of merge methods and their kernels · ``noise`` masks that never change ·
``layout`` what tensors' names say · ``donors`` where tensors live · ``adapters`` LoRA ·
``plan`` which tensors each tensor of the result is of · ``vocabulary`` one for all models ·
``builder`` a recipe into the live model · ``checkpoint`` to disk.
"""
