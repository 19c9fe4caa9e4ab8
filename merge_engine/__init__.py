"""Turn a recipe and its donors into weights. Knows nothing of scores.

``recipe`` mergekit's YAML, both ways · ``parameters`` a setting to a number per tensor ·
``methods`` one table of merge methods and their kernels · ``noise`` masks that never change ·
``donors`` where tensors live · ``builder`` a recipe into the live model · ``checkpoint`` to disk.
"""
