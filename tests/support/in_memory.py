"""A family without files, for tests of what is done with tensors."""

from collections.abc import Sequence

from torch import Tensor

from merge_engine.models.checkpoint import TensorInfo
from merge_engine.models.model_set import ModelSet
from merge_engine.numerics.kernel_runner import KernelRunner


class InMemory(ModelSet):
    """A family whose one tensor, "x", lives in memory: model "m0" has the first, "m1" the next."""

    repeated = True  # as in a study: what is large and worked out once is kept

    def __init__(self, tensors: Sequence[Tensor], stream: KernelRunner | None = None) -> None:
        self.stored = {f"m{i}": tensor for i, tensor in enumerate(tensors)}
        self.reference = self
        self.stream = stream or KernelRunner(compiled=False)
        self.tensors = {"x": TensorInfo(None, tuple(tensors[0].shape), tensors[0].dtype)}

    def read(self, model: str, name: str) -> Tensor:
        return self.stored[model]

    def depth(self, name: str) -> float:
        return 0.0
