"""Every method against mergekit 0.1.5's kernels, and against its own properties."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors, registered_methods
from torch import Tensor

from in_memory import in_memory
from merge_engine.building.merging import merge_tensor, merged_tensors
from merge_engine.errors import MergeError
from merge_engine.methods import METHODS, Base, Elementwise
from merge_engine.numerics.noise import LEVELS, key_of, level
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import parse_recipe
from uniform import uniform

# rms(e)/rms(w) and max|e|/max|w| against mergekit in float32: twice its own distance from float64.
TOLERANCES = {
    "linear": (2e-7, 1e-6),
    "slerp": (3e-6, 1e-5),
    "task_arithmetic": (2e-7, 1e-6),
    "model_stock": (5e-7, 2e-6),
    "nuslerp": (5e-7, 1e-6),
    "nuslerp without base": (5e-6, 2e-5),
    "multislerp": (5e-7, 2e-6),
    "multislerp without base": (2e-5, 2e-5),
    "karcher": (5e-6, 2e-5),
    "passthrough": (0.0, 0.0),
    "ties": (3e-7, 1e-6),  # a ratio of norms, which mergekit sums in float32
    "dare_linear": (3e-7, 1e-6),
    "dare_ties": (3e-7, 1e-6),
    "della_linear": (1e-7, 1e-6),
    "della": (1e-7, 1e-6),
    "breadcrumbs": (3e-7, 1e-6),
    "breadcrumbs_ties": (3e-7, 1e-6),
    "sce": (1e-6, 1e-6),
    "ram": (1e-6, 1e-6),
    "ramplus_tl": (1e-6, 1e-6),
    "nearswap": (2e-7, 1e-6),
    "arcee_fusion": (1e-7, 1e-6),
}
SHAPES = [(64, 48), (1, 33), (33, 1), (97,), (1,), (3, 8, 5)]
RANDOM = [m for m, row in METHODS.items() if isinstance(row, Elementwise) and row.random]
FIXED = [m for m in METHODS if m not in RANDOM]
STARTING = [m for m, row in METHODS.items() if row.base in (Base.ORIGIN, Base.OPTIONAL)]
DEVICE = torch.device("cpu")
THEIRS = {method.spec.name: method.spec for method in registered_methods()}


@dataclass
class Case:
    """A merge of tensors, the first of which is the base model's if ``base``."""

    method: str
    tensors: list[Tensor]
    base: bool
    per_donor: dict = field(default_factory=dict)
    shared: dict = field(default_factory=dict)

    @property
    def donors(self) -> list[Tensor]:
        return self.tensors[1:] if self.base else self.tensors

    @property
    def recipe(self) -> Recipe:
        models = [f"m{i}" for i in range(len(self.tensors))]
        if self.base and METHODS[self.method].base is not Base.ENDPOINT:
            models = models[1:]
        mapping = {
            "merge_method": self.method,
            "models": [
                {"model": m, "parameters": {k: v[i] for k, v in self.per_donor.items()}}
                for i, m in enumerate(models)
            ],
            "parameters": self.shared,
        } | ({"base_model": "m0"} if self.base else {})
        recipe, _notes = parse_recipe(mapping, where="test")
        return recipe

    def merged(self) -> Tensor:
        return merge_tensor(self.recipe, "x", in_memory(self.tensors), DEVICE)

    def oracle(self, **options) -> Tensor:
        parameters = {**{k: list(v) for k, v in self.per_donor.items()}, **self.shared}
        return merge_tensors(
            [tensor.float() for tensor in self.tensors],
            self.method,
            parameters=parameters,
            base_index=0 if self.base else None,
            **options,
        )

    @property
    def gain(self) -> float:
        weight = self.per_donor.get("weight", [1.0])
        relative = self.method == "nuslerp" or any(
            self.shared.get(name) for name in ("normalize", "normalize_weights")
        )
        total = abs(sum(weight)) if relative else 1.0
        gain = sum(map(abs, weight)) * self.shared.get("lambda", 1.0) / (total or 1.0)
        return max(1.0, gain)

    def assert_close(self, mine: Tensor, theirs: Tensor) -> None:
        assert mine.dtype == torch.float32
        assert mine.shape == theirs.shape
        error = mine.double() - theirs.double()
        # What was rounded, and how much the weights then make of it.
        size = torch.stack([t.double() for t in (theirs, *self.tensors)]) * self.gain
        named = self.method if self.base else f"{self.method} without base"
        rms, largest = TOLERANCES.get(named, TOLERANCES[self.method])
        assert error.pow(2).mean().sqrt() <= rms * size.pow(2).mean().sqrt() + 1e-12
        assert error.abs().max() <= largest * size.abs().max() + 1e-12


def make_tensors(
    count: int, shape: tuple[int, ...], seed: int, dtype=torch.float32, change: float = 2e-3
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.02
    deltas = [torch.randn(shape, generator=generator) * change for _ in range(count - 1)]
    return [tensor.to(dtype) for tensor in (base, *(base + delta for delta in deltas))]


def case_of(method: str, donors: Sequence[Tensor], base: Tensor | None = None, **given) -> Case:
    """A case with a parameter per donor as a list, the others as numbers."""
    per_donor = {name: value for name, value in given.items() if isinstance(value, list)}
    shared = {name: value for name, value in given.items() if name not in per_donor}
    tensors = [*donors] if base is None else [base, *donors]
    return Case(method, tensors, base is not None, per_donor, shared)


def plain(method: str, tensors: Sequence[Tensor], turned: bool = False) -> Case:
    """The method with all it requires, over the first tensor as base and as many as it takes."""
    row = METHODS[method]
    base = None if row.base is Base.INPUT else tensors[0]
    donors = tensors[1 : 1 + ((row.donors[1] or 99) - (row.base is Base.ENDPOINT))]
    given = {"weight": [0.4, 1.1, 0.2][: len(donors)]} if "weight" in row.params else {}
    given |= {"t": 1e-3} if "t" in row.params else {}
    order = -1 if turned else 1
    given = {k: v[::order] if isinstance(v, list) else v for k, v in given.items()}
    return case_of(method, donors[::order], base, **given)


def degenerate(tensors: list[Tensor], kind: str) -> list[Tensor]:
    first, *others = tensors
    if kind == "untouched donor":
        return [*tensors[:-1], first.clone()]
    if kind == "zero donor":
        return [*tensors[:-1], torch.zeros_like(first)]
    if kind == "same donors":
        return [first, *(others[0].clone() for _ in others)]
    return [first.clone() for _ in tensors] if kind == "all the same" else tensors


CHOICES = {
    "weight": st.sampled_from([-0.7, 0.0, 0.3, 1.0, 1.4]),
    "density": st.sampled_from([0.0, 0.05, 0.31, 0.5, 0.9, 1.0]),
    "gamma": st.sampled_from([0.0, 0.01, 0.1, 0.6]),
    "lambda": st.sampled_from([1.0, 0.35, 1.3]),
    "t": st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.2]),
    "nearswap t": st.sampled_from([0.0, 3e-7, 1e-4, 1e-3, 0.05]),
    "epsilon": st.sampled_from([0.0, 1e-5, 1e-3]),
    "ramplus_tl epsilon": st.sampled_from([1e-5, 1e-3]),  # 0 is a named test
    "della epsilon": st.sampled_from([0.0, 0.02, 0.04]),
    "della_linear epsilon": st.sampled_from([0.0, 0.02, 0.04]),
    "select_topk": st.sampled_from([0.0, 0.01, 0.31, 0.5, 1.0]),
    "r": st.sampled_from([0.0, 0.1, 0.8]),
    "alpha": st.sampled_from([0.0, 0.2, 1.5]),
    "scale": st.sampled_from([1.0, 0.0, -0.3]),
    "max_iter": st.sampled_from([1, 3, 10]),
    "tol": st.sampled_from([1e-5, 1e-3]),
    "eps": st.sampled_from([1e-8, 1e-5]),
}


@st.composite
def cases(draw, method: str) -> Case:
    row = METHODS[method]
    base = row.base in (Base.ORIGIN, Base.ENDPOINT)
    base = draw(st.booleans()) if row.base is Base.OPTIONAL else base
    starts = base and row.base is not Base.ENDPOINT
    owners = draw(st.integers(max(1, row.donors[0]), row.donors[1] or 3))
    # Equal magnitudes, of which 16 bits have many, have no order: della's ranks are anybody's.
    dtypes = [torch.float32] * (1 if "della" in method else 2)
    dtypes += [] if "della" in method else [torch.bfloat16, torch.float16]
    dtype = draw(st.sampled_from(dtypes))
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 999))
    kind = draw(
        st.sampled_from(
            ["ordinary"] * 3 + ["untouched donor", "zero donor", "same donors", "all the same"]
        )
    )
    tensors = make_tensors(owners + starts, shape, seed, dtype, draw(st.sampled_from([2e-3, 2e-4])))
    drawn = {
        name: st.booleans()
        if p.kind is bool
        else CHOICES.get(f"{method} {name}", CHOICES.get(name))
        for name, p in row.params.items()
        if p.effect
    }
    per_donor = {
        name: draw(st.lists(drawn[name], min_size=owners, max_size=owners))
        for name in drawn
        if row.params[name].per_donor
    }
    shared = {name: draw(drawn[name]) for name in drawn if not row.params[name].per_donor}
    if shared.get("normalize") or method == "multislerp":  # over next to nothing, rounding is all
        assume(abs(sum(per_donor["weight"])) > 0.25)
    return Case(method, degenerate(tensors, kind), base, per_donor, shared)


@pytest.mark.oracle
@pytest.mark.parametrize("method", [m for m in FIXED if m in THEIRS])
@given(data=st.data())
def test_method_equals_mergekit(method, data):
    case = data.draw(cases(method))
    if method == "multislerp":
        assume(not is_undefined_in_mergekit(case))
        assume(not nearly_cancels(case))
    theirs = case.oracle()
    if method in ("model_stock", "multislerp", "nuslerp"):  # near their poles
        start = case.tensors[0].float() if case.base else torch.zeros(())
        reach = max(float((tensor.float() - start).abs().max()) for tensor in case.tensors)
        assume(float((theirs - start).abs().max()) <= 1.5 * reach)  # rounding is amplified
    assume(not any(is_ambiguous(*cut) for cut in cuts(case)))
    case.assert_close(case.merged(), theirs)


def is_undefined_in_mergekit(case: Case) -> bool:
    """Task vectors that are all zero, or cancel out: it raises ValueError for three and more."""
    try:
        case.oracle()
    except ValueError:
        return True
    return False


def nearly_cancels(case: Case) -> bool:
    """Whether the weighted directions all but cancel out, so that rounding decides theirs."""
    start = case.tensors[0].double() if case.base else torch.zeros((), dtype=torch.float64)
    vectors = [donor.double() - start for donor in case.donors]
    weight = case.per_donor["weight"]
    mean = sum(w * v / v.norm().clamp_min(1e-30) for w, v in zip(weight, vectors, strict=True))
    known = any(vector.any() for vector in vectors)
    return known and float(mean.norm()) < 0.1 * sum(map(abs, weight))


def cuts(case: Case) -> Iterator[tuple[Tensor, int]]:
    """What is ranked, and after how many from above a line is drawn."""
    deltas = [donor.float() - case.tensors[0].float() for donor in case.donors]
    if case.method == "sce" and case.shared["select_topk"] < 1:
        variance = torch.stack(deltas).var(0, unbiased=False)
        yield variance, int(int(variance.count_nonzero()) * case.shared["select_topk"])
    size = case.tensors[0].numel()
    densities = case.per_donor.get("density", ()) if case.method in SORTING else ()
    for index, (delta, density) in enumerate(zip(deltas, densities, strict=False)):
        if 0 < density < 1 and case.method == "ties":
            yield delta.abs(), max(1, int(density * size))
        elif 0 < density < 1:
            top = min(int(case.per_donor["gamma"][index] * size), size - int(density * size))
            yield delta.abs(), top
            yield delta.abs(), top + int(density * size)


SORTING = ("ties", "breadcrumbs", "breadcrumbs_ties")


def is_ambiguous(ranked: Tensor, kept: int) -> bool:
    """Return whether equal elements are at the bound, of which any may be kept."""
    values = ranked.flatten().sort(descending=True).values
    return 0 < kept < len(values) and bool(values[kept - 1] == values[kept] != 0)


@pytest.mark.oracle
@pytest.mark.parametrize("method", [m for m in RANDOM if m in THEIRS])
@given(data=st.data())
def test_random_method_equals_mergekit_under_its_masks(method, data):
    # mergekit is given our numbers to draw from: its own chances decide, so they are compared, too.
    case = data.draw(cases(method))
    density, shape = case.per_donor["density"], case.tensors[0].shape
    deltas = [donor - case.tensors[0] for donor in case.donors]
    if "della" in method and any(0 < share < 1 for share in density):
        rows = [delta.abs().reshape(1, -1) if delta.dim() < 2 else delta.abs() for delta in deltas]
        assume(rows[0].shape[1] > 1)
        assume(not any(has_equals(row) for row in rows))
    noise = [uniform(key_of(0, "x", index), shape) for index in range(len(deltas))]
    draws = [d < 1 if "dare" in method else 0 < d < 1 for d in density]
    queue = iter([drawn for drawn, needed in zip(noise, draws, strict=True) if needed])

    def bernoulli(chances: Tensor) -> Tensor:
        drawn = next(queue).reshape(chances.shape)
        if "della" in method:
            assert (chances - of_bytes(chances)).abs().max() <= 0.04 / 255 + 3 / LEVELS
            chances = of_bytes(chances)
        return (drawn < chances).float()

    with patch.object(torch, "bernoulli", bernoulli):
        theirs = case.oracle()
    assert next(queue, None) is None
    case.assert_close(case.merged(), theirs)


def of_bytes(chances: Tensor) -> Tensor:
    """Return chances of elements by rank with the ranks' shares in 8 bits."""
    least, most = float(chances.min()), float(chances.max())
    shares = (255 * (chances - least) / max(most - least, 1e-9)).round().int()
    return (level(least) + (shares * level((most - least) * 256 / 255) >> 8)) / LEVELS


def has_equals(rows: Tensor) -> bool:
    values = rows.sort(dim=1).values
    return bool(((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)).any())


@pytest.mark.oracle
def test_all_of_mergekits_methods_are_there():
    assert THEIRS.keys() <= METHODS.keys()


@pytest.mark.oracle
@pytest.mark.parametrize("method", THEIRS)
def test_parameters_and_defaults_are_mergekits(method):
    theirs = {p.name: p for p in THEIRS[method].parameters}
    mine = METHODS[method].params
    assert set(mine) == set(theirs)
    for name, param in mine.items():
        required = param.default is None
        # passthrough's scale has no default there and None is "as it is", which is a factor of 1.
        default = 1.0 if (method, name) == ("passthrough", "scale") else theirs[name].default
        assert required or param.default == default, name
        assert param.per_donor == (theirs[name].scope.value != "shared"), name


@pytest.mark.parametrize("method", STARTING)
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_of_the_base_merge_to_the_base(method, shape):
    base = make_tensors(1, shape, 0)[0]
    torch.testing.assert_close(plain(method, [base] * 4).merged(), base, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_of_one_donor_merge_to_finite_tensors(method, shape):
    base, donor = make_tensors(2, shape, 0)
    result = plain(method, [base, donor, donor, donor]).merged()
    assert result.shape == shape
    assert result.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_zeros_merge_to_zeros(method):
    zeros = torch.zeros(6, 5)
    assert not plain(method, [zeros] * 4).merged().any()


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if "lambda" in row.params])
def test_scale_zero_is_the_base(method):
    case = plain(method, make_tensors(4, (16, 8), 1))
    case.shared["lambda"] = 0.0
    assert torch.equal(case.merged(), case.tensors[0])


@pytest.mark.parametrize("method", [m for m in FIXED if METHODS[m].donors[1] is None])
def test_order_of_donors_does_not_matter(method):
    tensors = make_tensors(4, (16, 8), 2)
    one, other = (plain(method, tensors, turned).merged() for turned in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_changed(method):
    case = plain(method, make_tensors(4, (16, 8), 3))
    before = [tensor.clone() for tensor in case.tensors]
    case.merged()
    assert all(torch.equal(one, other) for one, other in zip(case.tensors, before, strict=True))


@given(size=st.integers(1, 200), density=st.floats(0.001, 1.0), seed=st.integers(0, 99))
def test_ties_keeps_the_density(size, density, seed):
    base, donor = make_tensors(2, (size,), seed)
    result = case_of("ties", [donor], base, weight=[1.0], density=[density]).merged()
    changed = int((result != base).sum())
    assert changed <= max(1, int(density * size))
    assert changed >= max(1, int(density * size)) - 1  # a kept delta below the base's own rounding


@given(
    size=st.integers(1, 200),
    density=st.floats(0.0, 0.999),
    gamma=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_breadcrumbs_keeps_the_density_for_every_gamma(size, density, gamma, seed):
    base, donor = torch.zeros(size), make_tensors(1, (size,), seed)[0]
    given = {"weight": [1.0], "density": [density], "gamma": [gamma]}
    result = case_of("breadcrumbs", [donor], base, **given).merged()
    assert int(result.count_nonzero()) == int(density * size)


@pytest.mark.parametrize(
    ("gamma", "kept"), [(0.0, [6, 7, 8, 9, 10]), (0.2, [4, 5, 6, 7, 8]), (0.9, [1, 2, 3, 4, 5])]
)
def test_breadcrumbs_drops_outliers_as_far_as_the_density_allows(gamma, kept):
    donor = torch.tensor([7.0, -1, 3, -10, 5, -6, 2, -8, 9, -4])
    given = {"weight": [1.0], "density": [0.5], "gamma": [gamma]}
    result = case_of("breadcrumbs", [donor], torch.zeros(10), **given).merged()
    assert sorted(result[result != 0].abs().tolist()) == kept


@pytest.mark.parametrize("method", RANDOM)
def test_random_method_keeps_the_density_and_the_norm(method):
    base, donor = make_tensors(2, (400, 500), 4)
    given = {"weight": [1.0], "density": [0.3]}
    result = case_of(method, [donor], base, **given).merged()
    kept = (result != base).double().mean().item()
    assert abs(kept - 0.3) < 4 * math.sqrt(0.3 * 0.7 / base.numel())
    ratio = (result - base).abs().sum() / (donor - base).abs().sum()
    assert abs(ratio - 1) < 1e-4


def test_della_keeps_large_elements_more_often():
    base, donor = make_tensors(2, (400, 500), 4)
    given = {"weight": [1.0], "density": [0.5], "epsilon": [0.4]}
    kept = case_of("della", [donor], base, **given).merged() != base
    order = (donor - base).abs().argsort(dim=1)
    shares = kept.gather(1, order).double().mean(0)  # by rank; chances are 0.1 .. 0.9
    wanted = torch.linspace(0.1, 0.9, 500, dtype=torch.float64)
    assert (shares - wanted).abs().max() < 5 * 0.5 / 400**0.5
    assert abs((shares - wanted).mean()) < 4 * 0.5 / 200_000**0.5


def test_average_of_weights_that_sum_to_zero_is_refused():
    # mergekit divides by the zero and writes inf and NaN.
    for method in ("linear", "multislerp"):
        with pytest.raises(ValueError, match=r"weights \[1.0, -1.0\] sum to 0"):
            case_of(method, make_tensors(2, (4,), 0), weight=[1.0, -1.0]).merged()


def test_one_donor_of_weight_one_is_the_donor_bit_for_bit():
    base, *donors = make_tensors(4, (16, 8), 5)
    result = case_of("task_arithmetic", donors, base, weight=[0.0, 1.0, 0.0]).merged()
    assert torch.equal(result, donors[1])
    assert torch.equal(case_of("multislerp", donors[:1], base, weight=[0.3]).merged(), donors[0])
    assert torch.equal(case_of("passthrough", donors[:1]).merged(), donors[0])
    assert torch.equal(case_of("karcher", donors[:1]).merged(), donors[0])
    assert torch.equal(case_of("nearswap", donors[:1], base, t=1.0).merged(), donors[0])


@given(seed=st.integers(0, 99), t=st.sampled_from([0.0, 1e-6, 1e-4, 1e-3, 1.0]))
def test_nearswap_moves_towards_the_donor_by_t_at_the_most(seed, t):
    base, donor = make_tensors(2, (40,), seed)
    result = case_of("nearswap", [donor], base, t=t).merged()
    torch.testing.assert_close(result, base + (donor - base).clamp(-t, t), rtol=1e-6, atol=2e-9)


def test_karcher_mean_of_orthogonal_tensors_has_equal_angles_to_them():
    # By symmetry: for unit vectors e1, e2, e3 the direction (1, 1, 1) / sqrt 3, of length 1.
    result = case_of("karcher", list(torch.eye(3))).merged()
    torch.testing.assert_close(result, torch.full((3,), 3**-0.5))


def test_karcher_mean_is_a_stationary_point():
    # The definition: the logarithms at the mean sum to zero.
    donors = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = case_of("karcher", donors, max_iter=100, tol=1e-9).merged().double()
    mean, pull = found / found.norm(), torch.zeros(50, dtype=torch.float64)
    for donor in donors:
        unit = donor.double() / donor.double().norm()
        angle = (unit @ mean).acos()
        pull += angle / angle.sin() * (unit - (unit @ mean) * mean)
    assert pull.norm() < 1e-6
    expected = sum(donor.double().norm() for donor in donors) / 4
    assert abs(found.norm() - expected) < 1e-6 * expected


@pytest.mark.parametrize("shape", [(6, 5), (300, 400)])  # merged at once, and in pieces
def test_nuslerp_row_wise_interpolates_stored_columns(shape):
    # mergekit's names are inverted (a row of the transposed matrix), and so are ours.
    one, other = make_tensors(2, shape, 8, change=0.02)
    given = {"weight": [0.4, 0.6], "nuslerp_flatten": False}
    columns = case_of("nuslerp", [one, other], **given, nuslerp_row_wise=True).merged()
    turned = case_of("nuslerp", [one.T.contiguous(), other.T.contiguous()], **given).merged()
    torch.testing.assert_close(columns, turned.T)
    alone = case_of("nuslerp", [one[:, 2], other[:, 2]], weight=[0.4, 0.6]).merged()
    torch.testing.assert_close(columns[:, 2], alone)


@pytest.mark.oracle
def test_multislerp_of_unchanged_donors_is_the_base_where_mergekit_fails():
    # LoRA donors leave whole tensors as they were: that is no reason to refuse the merge.
    base = make_tensors(1, (8, 6), 0)[0]
    case = plain("multislerp", [base] * 4)
    with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
        case.oracle()
    assert torch.equal(case.merged(), base)


def test_multislerp_of_directions_that_cancel_out_is_refused():
    # mergekit compares float32's rounding with 1e-8, and so may return rounding blown up.
    star = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(MergeError, match=r"multislerp of 'x': the directions .* cancel out"):
        case_of("multislerp", star, weight=[1.0, 1.0, 1.0]).merged()


@pytest.mark.oracle
def test_della_keeps_an_element_alone_in_its_row_by_density_where_mergekit_divides_by_zero():
    base, donor = make_tensors(2, (5000, 1), 6)
    case = case_of("della_linear", [donor], base, weight=[1.0], density=[0.3])
    with pytest.raises(RuntimeError):
        case.oracle()
    kept = (case.merged() != base).double().mean().item()
    assert abs(kept - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 5000)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.15), (0.5, 0.6)])
def test_della_refuses_chances_outside_of_zero_to_one(method, density, epsilon):
    base, donor = make_tensors(2, (8, 6), 0)
    case = case_of(method, [donor], base, weight=[1.0], density=[density], epsilon=[epsilon])
    with pytest.raises(MergeError, match=f"{method} of 'x': density .* leaves"):
        case.merged()
    assert case_of(method, [donor], base, weight=[1.0], density=[1.0], epsilon=[0.6]).merged().any()


@pytest.mark.oracle
def test_norms_are_summed_in_float32_where_mergekits_float16_overflows():
    base, donor = torch.zeros(2000).half(), torch.full((2000,), 50.0).half()
    given = {"weight": [1.0], "density": [0.5], "rescale": True}
    case = case_of("ties", [donor], base, **given)
    parameters = given | {"normalize": True}
    theirs = merge_tensors([base, donor], "ties", parameters=parameters, base_index=0)
    assert theirs.isnan().any()
    assert case.merged().sum() == pytest.approx(2000 * 50, rel=0.002)  # half of equal elements


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl"])
def test_result_has_the_recipes_dtype_where_mergekit_writes_float32(method):
    case = plain(method, make_tensors(3, (8, 6), 0, torch.bfloat16))
    assert case.oracle(dtype=torch.bfloat16).dtype == torch.float32
    recipe = case.recipe.model_copy(update={"dtype": "bfloat16"})
    ((_, mine),) = merged_tensors(recipe, in_memory(case.tensors), DEVICE)
    assert mine.dtype == torch.bfloat16


def test_ramplus_without_a_threshold_stays_finite():
    # Two equal donors have no element of their own: mergekit divides 0 by an epsilon of 0.
    base, donor = make_tensors(2, (8, 6), 0)
    given = {"epsilon": 0.0}
    torch.testing.assert_close(case_of("ramplus_tl", [donor, donor], base, **given).merged(), donor)
    assert torch.equal(case_of("ramplus_tl", [base, base], base, **given).merged(), base)


@pytest.mark.oracle
def test_arcee_fusions_exact_quartiles_agree_with_mergekits_sampled_ones():
    # Over a million elements mergekit samples; ours must not depend on a seed.
    case = plain("arcee_fusion", make_tensors(2, (1200, 1250), 7, torch.float32))
    torch.manual_seed(0)
    mine, theirs = case.merged(), case.oracle()
    assert ((mine != case.tensors[0]) == (theirs != case.tensors[0])).double().mean() >= 0.999
    assert torch.equal(case.merged(), mine)


def test_every_row_has_a_paper_and_every_searched_parameter_a_legal_range():
    for row in METHODS.values():
        assert row.paper.startswith("https://")
        assert isinstance(row, Elementwise) or hasattr(row, "coefficients")
        for param in row.params.values():
            if param.search:
                assert param.valid[0] <= param.search[0] < param.search[1] <= param.valid[1]
