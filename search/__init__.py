"""Ask for recipes, score them, choose the winner and report it.

``cli`` the commands · ``spec`` study.yaml · ``space`` points to recipes and back · ``samplers``
who proposes: ``gaussian`` by a model of the trials, which has recipes at ``places`` · ``bench`` the
live model, donors and items of a study · ``storage`` what survives a kill · ``scoring`` a recipe's
answers · ``selection`` winner and verdict · ``runner`` the loop · ``result`` result.json ·
``terminal`` what the user sees.
"""
