"""Build merged weights from a recipe and its models. Knows nothing of scores.

``numerics`` statistics of tensors, noise, packs, and how kernels are run · ``methods`` the table of
merge methods and their kernels · ``recipe`` mergekit's YAML, read and written · ``models``
checkpoints, adapters and vocabularies, where tensors live and what is measured of them ·
``building`` a recipe into a live model or a checkpoint.
"""
