"""What a study is said to cost."""

from landscape import planted
from search.preparing.cost import describe_time
from simulated import simulated_context


def test_time_is_that_of_all_evaluations_and_builds():
    counts = {"search": 60, "select": 40, "test": 40}
    spec = simulated_context(planted(0), 0, counts, search={"trials": 100, "finalists": 8}).spec
    builds = 100 + 8 + len(spec.models) + 2
    line = describe_time(spec, 5000, 0.25, 2.0)
    assert line.startswith(f"time: about {(5000 * 0.25 + builds * 2.0) / 60:.0f} min, ")
    assert line.endswith("(0.25 s an item, 2 s a candidate)")
