"""Tables that a terminal shows at the end of a command."""

import io

from rich.console import Console

from search.showing.tables import print_result
from search.storing.result import read_result


def test_result_has_verdict_floors_and_front(simulated_folder):
    result = read_result(simulated_folder)
    with io.StringIO() as file:
        print_result(Console(file=file, width=200), result, simulated_folder)
        lines = [line.split() for line in file.getvalue().splitlines()]
    text = " ".join(word for line in lines for word in line)
    assert result.verdict_text in text
    assert result.floors_text in text
    assert "the Pareto front over the tasks" in text
    assert "report.html, checkpoint/" in text
    numbers = {int(line[0]) for line in lines if line and line[0].isdigit()}
    assert {one.trial for one in result.front} <= numbers
