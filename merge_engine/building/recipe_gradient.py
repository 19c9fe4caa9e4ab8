"""The gradient of a loss with respect to a recipe's weights, from a live model's backward pass.

The live model has the recipe's weights. As soon as the gradient of one of its tensors is complete,
a hook takes the inner products with the donors' task vectors and frees it, so only one gradient is
alive at a time. The gradient of a tied tensor is complete when both head and embedding have added
their parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merge_engine.building.builder import Builder
from merge_engine.building.elementwise_merge import kernel_arguments
from merge_engine.building.merging import of_owners, too_few
from merge_engine.building.pack_merge import PackMerge
from merge_engine.building.recomputing import recomputed_layers
from merge_engine.building.units import Units
from merge_engine.errors import MergeError
from merge_engine.methods import METHODS, Elementwise
from merge_engine.methods.derivative import linear_summands, products_kernel, weight_gradient
from merge_engine.numerics.packing import TensorPack
from merge_engine.recipe.recipe import Recipe


class RecipeGradient:
    """Gradients of losses of one live model with respect to the weights of its recipe.

    Args:
        builder: Has built a differentiable recipe; it may be another one in every call.
        units: Which tensors share a weight.
        recompute: Whether to recompute layers' activations in the backward pass (gradient
            checkpointing), which takes a third more time and far less memory.

    Attributes:
        recompute: As given; set when a single item does not fit into memory.
        batch: Most items of a backward pass; halved when they do not fit into memory.

    Raises:
        MergeError: The live model is offloaded.
    """

    def __init__(
        self, builder: Builder, units: Units, *, batch: int = 8, recompute: bool = False
    ) -> None:
        if any(tensor.is_meta for tensor in builder.model.parameters()):
            raise MergeError(
                "a gradient needs the live model's weights on its device; leave out --offload"
            )
        self.recompute = recompute
        self.batch = batch
        self._builder = builder
        self._units = units
        self._packs: dict[str, TensorPack] = {}  # each of one tensor

    def value_and_grad(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Return what ``loss`` returns, and its gradient.

        ``loss`` computes a scalar () with the live model; its parameters require gradients only
        during the call.

        Returns:
            The loss () and its gradient (units, donors), float64 on the CPU; donors are in the
            order of ``recipe.donors``.

        Raises:
            MergeError: The live model's recipe has no gradient.
        """
        recipe = self._recipe()
        with self._taking_products(recipe) as products, self._recomputing():
            with torch.enable_grad():
                value = loss()
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        gradient = torch.zeros(len(self._units), len(recipe.donors), dtype=torch.float64)
        for name, (found, donors, weighting) in products.items():
            gradient[self._units.index[name], donors] += weight_gradient(found.cpu(), **weighting)
        return value.detach().double().cpu(), gradient

    def values_and_grad(
        self,
        loss: Callable[[Sequence[int]], Tensor],
        items: Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of items, and the gradient of their weighted sum.

        Batches that do not fit into memory are halved, from here on.

        Args:
            loss: Computes the losses of numbered items (n,) with the live model.
            items: Their numbers, as ``loss`` takes them.
            weights: One for each item; default: those of the mean.

        Returns:
            The losses (n,) and the gradient (units, donors), float64 on the CPU.
        """
        weights = [1 / len(items)] * len(items) if weights is None else weights
        losses: list[Tensor] = []
        total = torch.zeros(len(self._units), len(self._recipe().donors), dtype=torch.float64)
        start = 0
        while start < len(items):
            part = slice(start, start + self.batch)
            found: list[Tensor] = []

            def weighted(part: slice = part, found: list[Tensor] = found) -> Tensor:
                values = loss(items[part])
                found.append(values.detach().double().cpu())
                return values @ values.new_tensor(weights[part])

            try:
                total += self.value_and_grad(weighted)[1]
            except torch.OutOfMemoryError:
                self._save_memory()
                continue
            losses += found
            start = part.stop
        return torch.cat(losses), total

    def _save_memory(self) -> None:
        """Halve the batches, or recompute activations.

        Raises:
            MergeError: Both have been done already.
        """
        if self.batch > 1:
            self.batch //= 2
        elif not self.recompute:
            self.recompute = True
        else:
            raise MergeError(
                "not enough memory for the gradient of one item; free memory on the device, or use "
                "fewer examples (num_fewshot), shorter answers or a smaller model"
            )
        torch.cuda.empty_cache()

    def _recipe(self) -> Recipe:
        recipe = self._builder.loaded
        if recipe is None:
            raise MergeError("the live model has no recipe's weights; build one first")
        (first, *others) = recipe.parts
        if others or first.layers is not None:
            raise MergeError("a recipe of slices has no gradient; write it with 'models'")
        if not recipe.method.differentiable:
            able = ", ".join(name for name, row in METHODS.items() if row.differentiable)
            raise MergeError(f"{recipe.merge_method} has no gradient; these have one: {able}")
        return first.recipe

    def _recomputing(self) -> contextlib.AbstractContextManager[None]:
        model = self._builder.model
        return recomputed_layers(model) if self.recompute else contextlib.nullcontext()

    @contextlib.contextmanager
    def _taking_products(self, recipe: Recipe) -> Iterator[dict[str, _Products]]:
        """Require gradients of the live parameters, and take their products by stored tensor."""
        products: dict[str, _Products] = {}
        parameters = dict(self._builder.model.named_parameters())
        needed = {name: each.requires_grad for name, each in parameters.items()}
        hooks = []
        for name, parameter in parameters.items():
            parameter.grad = None
            own = [
                n
                for n in self._builder.live.parts(name, parameter.detach())
                if n in self._units.index
            ]
            parameter.requires_grad_(bool(own) and parameter.is_floating_point())
            if parameter.requires_grad:
                take = self._hook(recipe, name, products)
                hooks.append(
                    parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
                )
        try:
            yield products
        finally:
            for hook in hooks:
                hook.remove()
            for name, parameter in parameters.items():
                parameter.grad = None
                parameter.requires_grad_(needed[name])

    def _hook(
        self, recipe: Recipe, live: str, products: dict[str, _Products]
    ) -> Callable[[nn.Parameter], None]:
        """Return a hook that takes the products of a live parameter's gradient and frees it."""

        @torch.no_grad()
        def take(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            for name, part in self._builder.live.parts(live, gradient).items():
                if name in self._units.index and (found := self._products(recipe, name, part)):
                    if name in products:  # a part of the model went backward on its own
                        found = found._replace(inner=found.inner + products[name].inner)
                    products[name] = found

        return take

    def _products(self, recipe: Recipe, name: str, gradient: Tensor) -> _Products | None:
        """Return a tensor's inner products; None if it is not merged."""
        models, donors = self._builder.model_set, [source.model for source in recipe.donors]
        owners = models.inputs[name]
        if any(model not in owners for model in recipe.models_read):
            recipe = of_owners(recipe, name, owners)
            if too_few(recipe):
                return None
        if not recipe.donors:
            return None
        if name not in self._packs:
            self._packs[name] = TensorPack({name: tuple(gradient.shape)})
        pack = self._packs[name]
        merge = PackMerge.from_recipe(recipe, pack, models, gradient.device)
        indices = [donors.index(source.model) for source in recipe.donors]
        (values,) = merge.values
        weighting = {name: values[name] for name in _WEIGHTING if name in values}
        return _Products(inner_products(merge, gradient), indices, weighting)


_WEIGHTING = ("weight", "normalize", "lambda_")  # parameters of `weight_gradient`


class _Products(NamedTuple):
    """One tensor's inner products, from which the derivatives of its weights follow."""

    inner: Tensor  # of the gradient and each task vector, (n,)
    donors: list[int]  # which of the recipe's donors they are, n
    weighting: dict[str, Any]  # the method's parameters that ``weight_gradient`` takes


def inner_products(merge: PackMerge, gradient: Tensor) -> Tensor:
    """Return the derivatives with respect to the factors of one tensor's task vectors.

    They are ``<gradient, v_i>`` with v_i the masked task vector of a donor (the donor itself if
    there is no origin), times the factor that restores its norm: (n,) float64 on the gradient's
    device, summed in float32 along rows and in float64 over them.
    """
    recipe, method, runner = merge.recipe, merge.recipe.method, merge.models.runner
    used = tuple(range(len(recipe.donors)))
    base = merge.read(recipe.origin) if recipe.origin else None
    if not isinstance(method, Elementwise):
        inputs = base, [merge.read(source.model) for source in recipe.donors]
        return runner.sums(products_kernel(linear_summands), inputs, {"gradient": gradient}).sum(1)
    assert method.sparsify is not None
    assert base is not None
    ones = [{**values, "weight": (1.0,) * len(used)} for values in merge.values]
    arguments = kernel_arguments(method, replace(merge, values=ones), base, used, combine=False)
    factors = arguments.per_donor.pop("factor")
    sums = runner.sums(
        products_kernel(method.sparsify),
        (base, arguments.donors),
        {**arguments.per_donor, "gradient": gradient},
        arguments.noise,
    )
    return sums.sum(1) * torch.tensor([float(each) for each in factors]).to(sums)
