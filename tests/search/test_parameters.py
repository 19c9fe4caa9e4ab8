"""Which methods, and which of their parameters, a study can search."""

from merge_engine.methods import METHODS
from search.study.parameters import DIFFERENCE_METHODS, allowed_methods, followers, searchable
from search.study.spec import ModelDifference


def test_methods_are_allowed_by_the_number_and_kind_of_donors():
    assert set(allowed_methods("abc")) == set(METHODS)
    assert "model_stock" not in allowed_methods("a")
    donors = ["a", ModelDifference(model="b", minus="c")]
    assert allowed_methods(donors) == DIFFERENCE_METHODS


def test_methods_of_a_common_vocabulary_name_the_base_and_all_models():
    left_out = set(allowed_methods("abc")) - set(allowed_methods("abc", aligned=True))
    assert left_out == {
        *("slerp", "karcher", "passthrough", "nuslerp", "nearswap", "arcee_fusion"),
    }
    assert {"nuslerp", "linear"} <= set(allowed_methods("ab", aligned=True))


def test_parameters_that_follow_from_scale_and_mixture_are_not_searched():
    for method in METHODS:
        assert not {"weight", "lambda", "scale"} & set(searchable([method]))
    assert "t" not in searchable(["slerp"])
    assert "density" in searchable(["ties"])


def test_one_name_of_two_meanings_follows_the_method_that_searches_it():
    assert followers("epsilon", ["della", "ram"]) == ("della",)
    assert followers("epsilon", ["ram", "ramplus_tl"]) == ("ram", "ramplus_tl")
