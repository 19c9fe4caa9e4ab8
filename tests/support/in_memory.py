"""A set of models without files, for tests of merging alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from merge_engine.models.checkpoint import TensorInfo
from merge_engine.models.model_set import ModelSet
from merge_engine.models.placement import Budget, TensorSource
from merge_engine.numerics.kernel_runner import KernelRunner

IN_MEMORY = Budget(device=1 << 62)


class InMemoryTensors(TensorSource):
    """One tensor, "x", of the models "m0", "m1", ..."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.stored = {f"m{i}": tensor for i, tensor in enumerate(tensors)}
        self.checkpoints = {}
        self.inputs = {"x": dict.fromkeys(self.stored, "x")}
        self.tensors = {"x": TensorInfo(None, tuple(tensors[0].shape), tensors[0].dtype)}

    @override
    def depth(self, name: str) -> float:
        return 0.0

    @override
    def read(self, model: str, name: str) -> Tensor:
        return self.stored[model]

    @override
    def dtype_of(self, model: str, name: str) -> torch.dtype:
        return self.stored[model].dtype

    @override
    def cache_key(self, model: str, name: str) -> Any:
        return None

    @override
    def release(self, model: str) -> None:
        pass


def in_memory(tensors: Sequence[Tensor], runner: KernelRunner | None = None) -> ModelSet:
    """Return the models as for a study: of what is measured, that which is large is kept, too."""
    runner = runner or KernelRunner(compiled=False)
    return ModelSet(InMemoryTensors(tensors), candidates=2, runner=runner)
