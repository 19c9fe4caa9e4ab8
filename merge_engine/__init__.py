"""Turn a recipe and its donors into weights. Knows nothing of scores.

``recipe`` mergekit's YAML, both ways · ``parameters`` a setting to a number per tensor · ``plan``
which tensors a recipe makes, and of what · ``methods`` one table of merge methods, their kernels
and what those have to know first · ``donors`` one model's files, ``adapters`` LoRA · ``family``
models that fit one another, and where their tensors live · ``layout`` what tensor names say ·
``vocabulary`` one set of tokens for models that differ · ``statistics`` what is computed once of a
donor · ``cache`` and kept on disk · ``stream`` a kernel in one pass · ``noise`` masks that never
change · ``memory`` what fits where · ``builder`` a recipe into the live model · ``checkpoint`` to
disk.
"""
