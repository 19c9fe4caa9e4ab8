"""What a study is said to cost."""

from landscape import planted
from search.preparing.cost import block_advice, describe_time
from simulated import simulated_context


def test_time_is_that_of_all_evaluations_and_builds():
    counts = {"search": 60, "select": 40, "test": 40}
    spec = simulated_context(planted(0), 0, counts, search={"trials": 100, "finalists": 8}).spec
    builds = 100 + 8 + len(spec.models) + 2
    line = describe_time(spec, 5000, 0.25, 2.0)
    assert line.startswith(f"time: about {(5000 * 0.25 + builds * 2.0) / 60:.0f} min, ")
    assert line.endswith("(0.25 s an item, 2 s a candidate)")


def test_larger_blocks_are_advised_where_items_of_larger_jobs_cost_far_less():
    counts = {"search": 1000, "test": 500}
    seconds = {"search": 1700.0, "test": 200.0}
    (advice,) = block_advice(20, counts, seconds)
    assert advice.startswith("an item took 1.7 s in blocks of 20 and 0.4 s in jobs of 100: ")
    assert not block_advice(100, counts, seconds)
    assert not block_advice(20, counts, seconds | {"test": 600.0})
    assert not block_advice(20, counts | {"search": 100}, seconds | {"search": 170.0}), "short"
