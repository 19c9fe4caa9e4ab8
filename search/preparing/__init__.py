"""From a study to live objects.

``models`` checkpoints as transformers models · ``tasks`` items and prompts · ``context`` a plan of
all that can fail, then the live objects · ``check`` what ``check`` prints · ``cost`` item
evaluations and disk.
"""
