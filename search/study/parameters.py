"""Which methods, and which of their parameters, a study can search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from merge_engine.methods import METHODS, Base, Param
from search.study.spec import ModelDifference, StudySpec

# The methods that add task vectors unchanged, and so can add a difference of any two models; the
# others trim or compare each model's own task vector.
DIFFERENCE_METHODS: Final = ("task_arithmetic",)
TUNED_FIRST: Final = {"task_arithmetic": 0, "linear": 1}  # of several methods with a gradient
TUNING_SAMPLERS: Final = ("auto", "gp")  # those that model tuned weights


def allowed_methods(
    donors: Sequence[object], at_most: int | None = None, *, aligned: bool = False
) -> tuple[str, ...]:
    """Return every method that can merge ``at_most`` of these donors (None: all).

    With ``aligned``, the models are given a common vocabulary first.
    """
    used = min(len(donors), at_most or len(donors))
    differ = any(isinstance(donor, ModelDifference) for donor in donors)
    return tuple(
        name
        for name in (DIFFERENCE_METHODS if differ else METHODS)
        if METHODS[name].donors[0] <= used
        and (METHODS[name].donors[1] != 2 or used >= 2)
        and (not aligned or names_all_models(name, len(donors), used))
    )


def names_all_models(method: str, donors: int, used: int) -> bool:
    """Return whether a method's recipes name the base and all donors, even if they use only some.

    Only from such a recipe can a vocabulary made of all models be rebuilt.
    """
    row = METHODS[method]
    named = row.base in (Base.ORIGIN, Base.OPTIONAL) or (
        row.base is Base.INPUT and "weight" in row.params
    )
    # A donor that is named and not used has the weight zero.
    return named and row.donors[1] in (None, donors) and (used == donors or "weight" in row.params)


def searchable(methods: Iterable[str]) -> dict[str, Param]:
    """Return the parameters of these methods that a study can fix or search, by name.

    ``weight``, ``lambda`` and slerp's ``t`` are not among them: they follow from the study's scale
    and mixture. Nor is passthrough's ``scale``, whose name is the study's.
    """
    found: dict[str, Param] = {}
    for method in methods:
        row = METHODS[method]
        derived = {"weight", "lambda", "scale"} | ({"t"} if row.base is Base.ENDPOINT else set())
        for name, param in row.params.items():
            new = name not in found or found[name].search is None
            if param.effect and name not in derived and new:
                found[name] = param
    return found


def followers(name: str, methods: Iterable[str]) -> tuple[str, ...]:
    """Return the methods whose parameter of this name takes the study's value.

    Some methods use one name for different things (``epsilon`` of della and of ram). The value is
    then for those with a search range in METHODS; the others keep their defaults.
    """
    having = tuple(method for method in methods if name in searchable((method,)))
    searched = tuple(m for m in having if METHODS[m].params[name].search is not None)
    return searched or having


def tuning_method(spec: StudySpec) -> str | None:
    """Return the method whose weights a study tunes by gradient; None: no tuning."""
    search = spec.search
    able = [name for name in search.methods if METHODS[name].differentiable]
    if search.tune is False or search.sampler not in TUNING_SAMPLERS or not able:
        return None
    return min(able, key=lambda name: TUNED_FIRST.get(name, len(TUNED_FIRST)))
