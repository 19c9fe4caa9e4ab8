"""Ask for recipes, evaluate them, choose the winner and report it.

The rooms in reading order, each importing only those before it:

``study`` what is wanted: study.yaml, read and checked
``racing`` how many items a candidate is evaluated on, and who is ahead: pure statistics
``storing`` what survives a kill: run folder, database, trials, result.json
``proposing`` which recipe next: search space, Gaussian process, samplers
``preparing`` from a study to live objects: plan, models, tasks
``running`` the loop: workers, evaluation, conclusion
``showing`` for people and programs: terminal, JSON lines, report, model card

Above them ``session`` checks everything and holds a run folder, ``steps`` are what is done with it,
``commands`` the commands, ``arguments`` and ``options`` the command line, ``cli`` the entry point,
``process`` what is set once per process.
"""
