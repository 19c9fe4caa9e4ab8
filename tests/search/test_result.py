"""result.json is read as it was written, also by an earlier version."""

import json

from search.storing.result import RESULT, read_result


def test_a_result_with_the_keys_of_an_earlier_version_is_read_alike(simulated_folder, tmp_path):
    written = json.loads((simulated_folder / RESULT).read_text())
    written["believed_score"] = written.pop("posterior_mean")
    written["items_asked"] = written.pop("split_evaluations")
    (tmp_path / RESULT).write_text(json.dumps(written))
    assert read_result(tmp_path) == read_result(simulated_folder)
