"""Libraries are silent by default; our own warnings become notes."""

import logging
import os
import warnings

from search.process import quiet_libraries


def test_own_warnings_are_notes_once_and_those_of_libraries_are_dropped(capfd):
    notes = []
    with quiet_libraries(notes.append):
        for _ in range(2):
            logging.getLogger("objectives.inference.fast_hflm").warning("halved to %d", 4)
            logging.getLogger("lm_eval.tasks").warning("defaulting to acc")
            warnings.warn("old", FutureWarning, stacklevel=1)
    assert notes == ["halved to 4"]
    assert capfd.readouterr() == ("", "")


def test_environment_is_set_inside_the_context_and_the_users_values_stay(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("DATASETS_VERBOSITY", "info")
    with quiet_libraries(print):
        assert os.environ["TQDM_DISABLE"] == "1"
        assert os.environ["DATASETS_VERBOSITY"] == "info"
    assert "TQDM_DISABLE" not in os.environ
    assert os.environ["DATASETS_VERBOSITY"] == "info"


def test_context_restores_the_environment():
    def settings():
        names = (None, "merge_engine", "objectives", "search")
        return [list(logging.getLogger(name).handlers) for name in names], warnings.filters[:]

    before = settings()
    with quiet_libraries(print):
        assert settings() != before
    assert settings() == before
