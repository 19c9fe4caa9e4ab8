"""Small search spaces: three donors, and differences of models as donors."""

from search.proposing.space import Space
from search.study.spec import ModelDifference

METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "linear", "slerp", "model_stock")


def small_space(**changes) -> Space:
    fields = {
        "base": "base",
        "donors": ("a", "b", "c"),
        "methods": METHODS,
        "scale": (0.0, 1.5),
        "ranges": {"density": (0.1, 1.0)},
    }
    return Space(**(fields | changes))


def differences(**changes) -> Space:
    donors = (
        ModelDifference(model="a", minus="b"),
        "c",
        ModelDifference(model="base", minus="c"),
    )
    return small_space(donors=donors, methods=("task_arithmetic",), ranges={}, **changes)
