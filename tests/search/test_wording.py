"""How numbers, names and untrusted text are written."""

from hypothesis import given
from hypothesis import strategies as st

from objectives.scores import Interval
from search.wording import (
    MAX_LETTERS,
    bracketed,
    plus_minus,
    printable_lines,
    short_names,
    shortened,
)


def test_intervals_are_in_per_cent_and_gains_have_a_sign():
    assert bracketed(Interval(0.871, 0.849, 0.893)) == "87.1 [84.9, 89.3]"
    assert plus_minus(Interval(0.871, 0.849, 0.893)) == "87.1 ± 2.2"
    assert bracketed(Interval(0.01, -0.02, 0.04), "+") == "+1.0 [-2.0, +4.0]"
    assert plus_minus(Interval(0.01, -0.02, 0.04), "+") == "+1.0 ± 3.0"


def test_name_is_short_where_no_other_has_the_same_last_part():
    names = ["/here/math", "/here/base", "org/code", "/here/code"]
    assert [*short_names(names, "/").values()] == ["math", "/here/base", "org/code", "/here/code"]


@given(st.text(), st.integers(4, 40))
def test_shortened_text_keeps_both_ends(text, most):
    short = shortened(text, most)
    assert len(short) <= most
    assert short == text or (text.startswith(short.split("…")[0]) and short[-1] == text[-1])


@given(st.text())
def test_printable_text_keeps_its_lines_and_has_nothing_unprintable(text):
    short = printable_lines(text)
    assert all(line.isprintable() for line in short.split("\n"))
    assert short.count("\n") == text.count("\n") or len(text) > MAX_LETTERS / 10
