"""When a race stops candidates: one JSON line per discordance and true difference.

    python tests/bench/bench_racing.py [--races 1000]

A candidate and the incumbent are evaluated on 240 items of four tasks in blocks of 20 and differ on
a share of them, the discordance. ``stopped`` is the share of candidates not evaluated on all,
``wrongly`` the share stopped that would have ended ahead, ``items`` the mean number of items.
"""

import argparse
import json
from itertools import product

import numpy as np

from search.racing.race import Race, Strata

TASKS = ("a", "b", "c", "d") * 60
ENDS = range(20, len(TASKS), 20)


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--races", type=int, default=1000)
    races = parser.parse_args().races
    strata, generator = Strata(TASKS, dict.fromkeys(TASKS, 1.0)), np.random.default_rng(0)
    for discordance, gain in product((0.1, 0.2, 0.3), (-0.1, -0.05, -0.02, 0.0, 0.02, 0.03)):
        chances = [(discordance - gain) / 2, 1 - discordance, (discordance + gain) / 2]
        asked, ahead = [], []
        for _ in range(races):
            mine = generator.choice([-1.0, 0.0, 1.0], len(TASKS), p=chances)
            race = Race(strata)
            race.record(np.zeros(len(TASKS)))
            asked.append(
                next((end for end in ENDS if not race.should_continue(mine[:end])), len(TASKS))
            )
            ahead.append(mine.mean() > 0)
        stopped = np.array(asked) < len(TASKS)
        row = {
            "discordance": discordance,
            "gain": gain,
            "stopped": round(float(stopped.mean()), 3),
            "wrongly": round(float((stopped & ahead).mean()), 3),
            "items": round(float(np.mean(asked))),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
