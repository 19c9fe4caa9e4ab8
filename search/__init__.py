"""Ask for recipes, score them, choose the winner and report it.

``cli`` the commands, their ``arguments`` · ``spec`` study.yaml, ``init`` writes one · ``space``
points to recipes and back · ``samplers`` who proposes: ``gaussian`` by a model of the trials, which
has recipes at ``places`` · ``stopping`` when nothing is left to gain · ``bench`` the live model,
donors and items of a study · ``plan`` what a study or recipe will take, and about what it will
``cost`` · ``folder`` a run's, and who holds it · ``storage`` what survives a kill, ``frozen``
items among it · ``scoring`` a recipe's answers · ``workers`` who builds and asks: one here, or
those of ``cluster`` · ``racing`` who is asked more of them · ``runner`` the loop, in a ``session``
that checks all before and exports after · ``front`` and ``selection`` who wins, and is it true ·
``conclusion`` the end of a run · ``result`` result.json · ``output`` what a command says: to people
in a ``terminal``, with a ``live`` view, while libraries are ``quiet`` · ``report`` a run's page,
with ``charts`` · ``responses`` what its models write · ``card`` a checkpoint's model card, and its
upload.
"""
