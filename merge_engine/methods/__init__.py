"""METHODS, the table of merge methods. A new method is one pure function and one row.

The YAML checks, the search space, README.md and the contract tests read this table.
``contract`` has its types; ``linear`` the weighted sums; ``task_vectors`` the kernels that sparsify
task vectors; ``comparing`` those that compare models element by element; ``preparation`` computes
kernels' values from parameters and statistics of whole task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from merge_engine.methods import comparing, linear, preparation, task_vectors
from merge_engine.methods.contract import Base, Elementwise, Linear, Method, Param

__all__ = ["METHODS", "Base", "Elementwise", "Linear", "Method", "Param"]

_WEIGHT = Param(float, per_donor=True)
_DENSITY = Param(float, 1.0, per_donor=True, valid=(0.0, 1.0), search=(0.05, 1.0))
_EPSILON = Param(float, 0.15, per_donor=True, valid=(0.0, 1.0), search=(0.01, 0.4))
_GAMMA = Param(float, 0.01, per_donor=True, valid=(0.0, 1.0), search=(0.0, 0.1))
_UNCHANGED = Param(float, 1e-5, valid=(0.0, math.inf))
_NO_EFFECT = Param(bool, False, effect=False)


def _task_vector_params(*, normalize: bool, rescale: bool) -> dict[str, Param]:
    """Return the parameters that task-vector methods have in common; two defaults differ."""
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
            differentiable=True,
            paper="https://arxiv.org/abs/2203.05482",
        ),
        "slerp": Linear(
            coefficients=linear.slerp,
            base=Base.ENDPOINT,
            donors=(2, 2),
            params={"t": Param(float, search=(0.0, 1.0))},
            paper="https://doi.org/10.1145/325165.325242",
            gram=True,
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
            differentiable=True,
            paper="https://arxiv.org/abs/2212.04089",
        ),
        "model_stock": Linear(
            coefficients=linear.model_stock,
            base=Base.ORIGIN,
            donors=(2, None),
            params={"filter_wise": Param(bool, False)},
            paper="https://arxiv.org/abs/2403.19522",
            gram=True,
            dim=linear.model_stock_dim,
            dim_params=("filter_wise",),
        ),
        "nuslerp": Linear(
            coefficients=linear.nuslerp,
            base=Base.OPTIONAL,
            donors=(2, 2),
            params={
                "weight": _WEIGHT,
                "nuslerp_flatten": Param(bool, True),
                "nuslerp_row_wise": Param(bool, False),
            },
            paper="https://arxiv.org/abs/2403.13257",
            gram=True,
            dim=linear.nuslerp_dim,
            dim_params=("nuslerp_flatten", "nuslerp_row_wise"),
        ),
        "multislerp": Linear(
            coefficients=linear.multislerp,
            base=Base.OPTIONAL,
            donors=(1, None),
            params={
                "weight": _WEIGHT,
                "normalize_weights": Param(bool, True),
                "eps": Param(float, 1e-8, valid=(0.0, math.inf)),
            },
            paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            gram=True,
        ),
        "karcher": Linear(
            coefficients=linear.karcher,
            base=Base.INPUT,
            donors=(1, None),
            params={
                "max_iter": Param(int, 10, valid=(0, 10_000)),
                "tol": Param(float, 1e-5, valid=(0.0, 1.0)),
            },
            paper="https://arxiv.org/abs/2603.04972",
            gram=True,
        ),
        "passthrough": Linear(
            coefficients=linear.passthrough,
            base=Base.INPUT,
            donors=(1, 1),
            params={"scale": Param(float, 1.0, per_donor=True)},
            paper="https://arxiv.org/abs/2403.13257",
        ),
        "ties": Elementwise(
            kernel=task_vectors.sparse_sum(task_vectors.trim),
            sparsify=task_vectors.trim,
            prepare=preparation.ties,
            combine=preparation.elected_sum,
            params=_task_vector_params(normalize=True, rescale=False),
            paper="https://arxiv.org/abs/2306.01708",
        ),
        "dare_linear": Elementwise(
            kernel=task_vectors.sparse_sum(task_vectors.drop_at_random),
            sparsify=task_vectors.drop_at_random,
            prepare=preparation.dare,
            combine=preparation.plain_sum,
            params=_task_vector_params(normalize=False, rescale=True),
            differentiable=True,
            paper="https://arxiv.org/abs/2311.03099",
            random=True,
        ),
        "dare_ties": Elementwise(
            kernel=task_vectors.sparse_sum(task_vectors.drop_at_random),
            sparsify=task_vectors.drop_at_random,
            prepare=preparation.dare,
            combine=preparation.elected_sum,
            params=_task_vector_params(normalize=False, rescale=True),
            paper="https://arxiv.org/abs/2311.03099",
            random=True,
        ),
        "della_linear": Elementwise(
            kernel=task_vectors.sparse_sum(task_vectors.drop_by_rank),
            sparsify=task_vectors.drop_by_rank,
            prepare=preparation.della,
            combine=preparation.plain_sum,
            elementwise_stat="rank_share",
            params={**_task_vector_params(normalize=False, rescale=True), "epsilon": _EPSILON},
            differentiable=True,
            paper="https://arxiv.org/abs/2406.11617",
            random=True,
        ),
        "della": Elementwise(
            kernel=task_vectors.sparse_sum(task_vectors.drop_by_rank),
            sparsify=task_vectors.drop_by_rank,
            prepare=preparation.della,
            combine=preparation.elected_sum,
            elementwise_stat="rank_share",
            params={**_task_vector_params(normalize=True, rescale=True), "epsilon": _EPSILON},
            paper="https://arxiv.org/abs/2406.11617",
            random=True,
        ),
        "breadcrumbs": Elementwise(
            kernel=task_vectors.sparse_sum(task_vectors.trim),
            sparsify=task_vectors.trim,
            prepare=preparation.breadcrumbs,
            combine=preparation.plain_sum,
            params={**_task_vector_params(normalize=False, rescale=False), "gamma": _GAMMA},
            differentiable=True,
            paper="https://arxiv.org/abs/2312.06795",
        ),
        "breadcrumbs_ties": Elementwise(
            kernel=task_vectors.sparse_sum(task_vectors.trim),
            sparsify=task_vectors.trim,
            prepare=preparation.breadcrumbs,
            combine=preparation.elected_sum,
            params={**_task_vector_params(normalize=False, rescale=False), "gamma": _GAMMA},
            paper="https://arxiv.org/abs/2312.06795",
        ),
        "sce": Elementwise(
            kernel=comparing.sce,
            prepare=preparation.sce,
            params={
                "select_topk": Param(float, 1.0, valid=(0.0, 1.0), search=(0.05, 1.0)),
                "int8_mask": _NO_EFFECT,
            },
            paper="https://arxiv.org/abs/2408.07990",
        ),
        "ram": Elementwise(
            kernel=comparing.ram,
            params={"epsilon": _UNCHANGED},
            paper="https://arxiv.org/abs/2601.13572",
        ),
        "ramplus_tl": Elementwise(
            kernel=comparing.ramplus_tl,
            prepare=preparation.ramplus_tl,
            params={
                "r": Param(float, 0.1, valid=(0.0, math.inf), search=(0.0, 1.0)),
                "alpha": Param(float, 0.2, valid=(0.0, math.inf), search=(0.0, 1.0)),
                "epsilon": _UNCHANGED,
            },
            paper="https://arxiv.org/abs/2601.13572",
        ),
        "nearswap": Elementwise(
            kernel=comparing.nearswap,
            donors=(1, 1),
            params={"t": Param(float, valid=(0.0, math.inf), search=(0.0, 0.002))},
            paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        ),
        "arcee_fusion": Elementwise(
            kernel=comparing.arcee_fusion,
            elementwise_stat="salience_mask",
            donors=(1, 1),
            params={},
            paper="https://www.arcee.ai",
        ),
    }
)
