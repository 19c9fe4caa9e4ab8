"""Ask for recipes, evaluate them, choose the winner and report it.

The rooms in reading order, each importing only those before it:

``study`` study.yaml, read and checked
``racing`` how many items a candidate is evaluated on, and who is ahead: pure statistics
``storing`` everything kept on disk: run folder, database, trials, result.json
``proposing`` the next recipe: search space, Gaussian process, samplers
``preparing`` from a study to live objects: plan, models, tasks
``running`` the loop: workers, evaluation, conclusion
``showing`` output: terminal, JSON lines, report, model card

Above them ``session`` checks everything and locks the run folder, ``pipeline`` searches, concludes,
exports and reports in it, ``commands`` has the commands, ``arguments`` and ``options`` the command
line, ``cli`` the entry point, ``process`` settings of the whole process.
"""
