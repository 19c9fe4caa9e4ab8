"""The one table of merge methods. A new method is one pure function and one row.

The YAML checks, the search space and the contract tests all read this table. ``linear`` holds the
kernels whose result is a weighted sum, ``task_vectors`` those that work element by element.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from merge_engine.methods import linear, task_vectors
from merge_engine.methods.contract import Base, Elementwise, Linear, Method, Param

__all__ = ["METHODS", "Base", "Elementwise", "Linear", "Method", "Param"]

_WEIGHT = Param(float, per_donor=True)
_DENSITY = Param(float, 1.0, per_donor=True, valid=(0.0, 1.0), search=(0.05, 1.0))
_NO_EFFECT = Param(bool, False, effect=False)


def _task_vector_params(*, normalize: bool, rescale: bool) -> dict[str, Param]:
    """The parameters that mergekit's task-vector methods share; two defaults differ."""
    return {
        "weight": _WEIGHT,
        "density": _DENSITY,
        "lambda": Param(float, 1.0),
        "normalize": Param(bool, normalize),
        "rescale": Param(bool, rescale),
        "int8_mask": _NO_EFFECT,
    }


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "linear": Linear(
            coefficients=linear.linear,
            base=Base.INPUT,
            donors=(1, None),
            params={"weight": _WEIGHT, "normalize": Param(bool, True)},
            paper="https://arxiv.org/abs/2203.05482",
        ),
        "slerp": Linear(
            coefficients=linear.slerp,
            base=Base.ENDPOINT,
            donors=(2, 2),
            params={"t": Param(float, search=(0.0, 1.0))},
            paper="https://doi.org/10.1145/325165.325242",
            gram="tensors",
        ),
        "task_arithmetic": Linear(
            coefficients=linear.task_arithmetic,
            base=Base.ORIGIN,
            donors=(0, None),
            params={
                **_task_vector_params(normalize=False, rescale=False),
                "density": Param(float, 1.0, per_donor=True, effect=False),
                "rescale": _NO_EFFECT,
            },
            paper="https://arxiv.org/abs/2212.04089",
        ),
        "model_stock": Linear(
            coefficients=linear.model_stock,
            base=Base.ORIGIN,
            donors=(2, None),
            params={"filter_wise": Param(bool, False)},
            paper="https://arxiv.org/abs/2403.19522",
            gram="task vectors",
            by_row="filter_wise",
        ),
        "ties": Elementwise(
            kernel=task_vectors.ties,
            base=Base.ORIGIN,
            donors=(0, None),
            params=_task_vector_params(normalize=True, rescale=False),
            paper="https://arxiv.org/abs/2306.01708",
        ),
        "dare_linear": Elementwise(
            kernel=task_vectors.dare_linear,
            base=Base.ORIGIN,
            donors=(0, None),
            params=_task_vector_params(normalize=False, rescale=True),
            paper="https://arxiv.org/abs/2311.03099",
            random=True,
        ),
        "dare_ties": Elementwise(
            kernel=task_vectors.dare_ties,
            base=Base.ORIGIN,
            donors=(0, None),
            params=_task_vector_params(normalize=False, rescale=True),
            paper="https://arxiv.org/abs/2311.03099",
            random=True,
        ),
    }
)
