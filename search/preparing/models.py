"""Checkpoints as transformers models and tokenizers, on the hardware that a run may use.

transformers takes seconds to import, so functions import it where needed: errors in a study are
reported before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merge_engine.building.builder import Builder
from merge_engine.errors import MergeError, reason
from merge_engine.models.alignment import text_config
from merge_engine.models.architecture import auto_class, load_config, make_without_weights
from merge_engine.models.checkpoint import Adapted, Checkpoint
from merge_engine.models.model_set import ModelSet
from merge_engine.models.opening import open_model
from merge_engine.models.size_check import check_layers
from merge_engine.models.vocabulary import Vocabulary, load_tokenizer
from merge_engine.numerics.kernel_runner import configure_compiler
from merge_engine.numerics.statistics import all_finite
from merge_engine.out_of_memory import is_out_of_memory
from merge_engine.recipe.recipe import Recipe, Tokenizer
from merge_engine.recipe.recipe_file import load_recipe, parse_recipe
from merge_engine.schema import find_folder
from search.preparing.offload import check_offload, offload
from search.proposing.space import Space
from search.proposing.starts import baselines
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Hardware:
    """The device and memory that one worker may use."""

    device: str  # of the live model; "auto": spread over all GPUs
    memory: int | None = None  # limit in bytes; None: what is free
    compiled: bool = True  # kernels may be compiled, where that pays
    sharers: int = 1  # number of workers on the host, which share one copy of the donors
    joins: bool = False  # it takes the place of one of them: the others have their memory
    share: float = 1.0  # part of the device that is this worker's
    offload: bool = False  # the live model stays in host memory; its layers are copied to `device`

    @property
    def lives_on(self) -> str:
        """Where the live model's weights are."""
        return "cpu" if self.offload else self.device

    @property
    def builds_on(self) -> torch.device:
        """Device on which candidates are merged and the donors' statistics computed."""
        return torch.device("cuda" if self.device == "auto" else self.lives_on)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name such as "bfloat16"."""
    return getattr(torch, name)  # type: ignore[no-any-return]


def model_dtype(checkpoint: Checkpoint) -> str:
    """Return the name of the dtype that most of a checkpoint's numbers have."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + torch.Size(info.shape).numel()
    return max(sizes, key=lambda name: sizes[name])


def study_dtype(spec: StudySpec, reference: Checkpoint) -> str:
    """Return the name of the dtype in which a study's candidates are evaluated and exported."""
    return spec.dtype or model_dtype(reference)


def load_model(
    spec: StudySpec,
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    vocabulary: Vocabulary | None = None,
) -> PreTrainedModel:
    """Load a checkpoint as a live model in evaluation mode.

    With ``vocabulary`` its embedding is resized, and a builder has to write the rows.

    Raises:
        MergeError, StudyError: Its files are damaged or incomplete, transformers cannot use it, or
            it needs ``trust_remote_code``.
    """
    trusted = spec.trust_remote_code
    _check_loadable(checkpoint)
    checkpoint.tensors  # our errors on damaged weights say more than transformers'  # noqa: B018
    with _explained(checkpoint):
        config = load_config(checkpoint.folder, trust_remote_code=trusted)
        model: PreTrainedModel
        model, found = auto_class(config).from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=torch_dtype(dtype),
            device_map=device,
            trust_remote_code=trusted,
            attn_implementation=None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # our error says more than transformers'
        )
        _check_complete(checkpoint, model, found)
        model.eval()
        return _resized(model, vocabulary)


def _check_complete(
    checkpoint: Checkpoint, model: PreTrainedModel, found: Mapping[str, Any]
) -> None:
    """Refuse a model some of whose tensors transformers made random, by its report on loading."""
    where = f"model {checkpoint.model!r}"
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise StudyError(
            f"{where}: {name!r} is of shape {[*stored]} in its files and {[*wanted]} by its "
            "config.json; correct that, or fetch it again"
        )
    if missing := sorted({*found["missing_keys"]} - {*dict(model.named_buffers())}):
        raise StudyError(
            f"{where}: its files lack {missing[0]!r}, which its config.json asks for; fetch it "
            "again, or correct that"
        )


_COUNTS = re.compile(r"(num|n)_(\w+_)?(layers?|heads?|experts|blocks|groups|labels)")
_MOST = 10_000  # of layers, heads or experts: libraries make an object for each


def _check_loadable(checkpoint: Checkpoint) -> None:
    """Refuse a folder from which transformers would load another model, or never finish."""
    if (file := checkpoint.folder / "adapter_config.json").is_file():
        raise StudyError(
            f"{file}: makes transformers load an adapter on another model instead of the weights "
            f"beside it; remove it, or name the model as 'BASE+{checkpoint.folder}'"
        )
    for config in (checkpoint.generation_config, checkpoint.config, text_config(checkpoint.config)):
        for key, count in config.items():
            if _COUNTS.fullmatch(key) and isinstance(count, int) and count > _MOST:
                raise StudyError(
                    f"{checkpoint.folder / 'config.json'}: {key} is {count:,}; correct it"
                )


def load_without_weights(
    spec: StudySpec, checkpoint: Checkpoint, dtype: str, vocabulary: Vocabulary | None = None
) -> PreTrainedModel:
    """Make a checkpoint's model on the meta device, without values.

    With ``vocabulary`` its embedding is resized.

    Raises:
        StudyError: transformers cannot use it, or it needs ``trust_remote_code``.
    """
    trusted = spec.trust_remote_code
    _check_loadable(checkpoint)
    with _explained(checkpoint):
        config = load_config(checkpoint.folder, trust_remote_code=trusted)
        model = make_without_weights(config, torch_dtype(dtype), trust_remote_code=trusted)
        return _resized(model, vocabulary)


def _resized(model: PreTrainedModel, vocabulary: Vocabulary | None) -> PreTrainedModel:
    """Give a model, its config and its generation config the rows and ids of a vocabulary."""
    if vocabulary is None:
        return model
    model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    configs: list[Any] = [model.config]
    if (inner := model.config.get_text_config()) is not model.config:
        configs.append(inner)
    if model.generation_config is not None:
        configs.append(model.generation_config)
    for config in configs:
        own = config.to_dict()
        for key, number in vocabulary.renumber(own).items():
            if number != own[key]:
                setattr(config, key, number)
    return model


def study_tokenizer(spec: StudySpec, models: ModelSet) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the models' vocabulary, or load the reference's."""
    tokenizer: PreTrainedTokenizerBase
    if models.vocabulary is not None:
        tokenizer = deepcopy(models.vocabulary.tokenizer)  # padding is set while items are scored
        return tokenizer
    with _explained(models.reference):
        tokenizer = load_tokenizer(models.reference, trust_remote_code=spec.trust_remote_code)
    return tokenizer


def open_model_set(
    models: Sequence[str], candidates: int = 1, tokenizer: Tokenizer | None = None
) -> ModelSet:
    """Open models to build candidates from, compiling kernels if that pays.

    ``tokenizer`` is the common vocabulary to give them; the first model is its base.

    Raises:
        MergeError: A model cannot be used, or differs from the others in shape.
    """
    model_set = ModelSet.open(models, candidates, tokenizer=tokenizer)
    if model_set.runner.compiled:
        configure_compiler()
    return model_set


def open_references(spec: StudySpec) -> ModelSet:
    """Open what of a study's models `load_scored` needs: the base, or all for a common vocabulary.

    Raises:
        MergeError: One cannot be used.
    """
    names = spec.models_read if spec.tokenizer else (spec.base_model,)
    return open_model_set(names, tokenizer=spec.tokenizer)


def load_scored(
    spec: StudySpec, model: str, hardware: Hardware, references: ModelSet
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint, hub id, ``base+adapter`` or recipe file, in the study's dtype.

    In a study with a ``tokenizer``, the study's models get that vocabulary; other checkpoints need
    to have it already.

    Returns:
        The live model, and the tokenizer to score it with: the study's, or the recipe's own.

    Raises:
        MergeError, StudyError: It cannot be loaded or built.
    """
    if hardware.offload:
        check_offload(spec, hardware.device)
        loaded = load_scored(spec, model, Hardware("cpu"), references)
        offload(loaded[0], hardware.device)
        return loaded
    dtype, found = study_dtype(spec, references.reference), _find_scored(spec, model, references)
    if isinstance(found, Checkpoint):
        live = load_model(spec, found, dtype, hardware.device)
        _check_finite(live, model, dtype)
        return live, study_tokenizer(spec, references)
    recipe, models = found
    live = load_model(spec, models.reference, dtype, hardware.device, models.vocabulary)
    Builder(live, models).build(recipe)
    own = models if recipe.vocabulary or spec.tokenizer else references
    return live, study_tokenizer(spec, own)


def _find_scored(
    spec: StudySpec, model: str, references: ModelSet
) -> Checkpoint | tuple[Recipe, ModelSet]:
    """Open a model to score: a checkpoint, or a recipe with the models to build it from."""
    if model.endswith((".yaml", ".yml")):
        recipe, _ = load_recipe(Path(model))
        return recipe, open_model_set(recipe.models_read, tokenizer=recipe.vocabulary)
    folder = find_folder(model)
    name = str(folder.resolve()) if folder else model
    if spec.tokenizer and name in spec.models_read:
        dtype = study_dtype(spec, references.reference)
        space = Space.from_spec(spec, references.layer_filters, dtype)
        return baselines(space)[name], references
    checkpoint = open_model(model)
    check_layers(checkpoint)
    _check_same_tokens(checkpoint, references.vocabulary)
    if not isinstance(checkpoint, Adapted):
        return checkpoint
    alone = {"model": model, "parameters": {"weight": 1.0}}
    recipe, _ = parse_recipe({"merge_method": "linear", "models": [alone]}, model)
    return recipe, open_model_set([model])


def _check_finite(live: PreTrainedModel, model: str, dtype: str) -> None:
    """Refuse a model with NaN or Inf among its weights: its output would be NaN."""
    for name, tensor in live.named_parameters():
        if not all_finite(tensor.detach()):
            raise StudyError(
                f"model {model!r}: {name!r} has NaN or Inf in {dtype}; fetch or train it again, or "
                "give the study a wider dtype"
            )


def _check_same_tokens(checkpoint: Checkpoint, vocabulary: Vocabulary | None) -> None:
    """Refuse a model that has other tokens than a study's vocabulary."""
    if vocabulary is None:
        return
    if load_tokenizer(checkpoint).get_vocab() != vocabulary.tokenizer.get_vocab():
        raise StudyError(
            f"model {checkpoint.model!r} has other tokens than the study's tokenizer gives; "
            "score a recipe of it with the study's 'tokenizer', or name it among the models"
        )


@contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn transformers' errors about a checkpoint into one sentence that says what to do."""
    try:
        yield
    except (MergeError, StudyError):
        raise
    except Exception as error:  # each config, model and tokenizer class raises its own
        if is_out_of_memory(error):
            raise
        wanted = re.findall(r"requires the (\S+) library", str(error))
        if isinstance(error, ImportError) and (wanted or error.name):
            raise StudyError(
                f"model {checkpoint.model!r}: transformers needs "
                f"{' and '.join(wanted or [str(error.name)])} to use it; install them"
            ) from error
        if "trust_remote_code" in str(error):
            raise StudyError(
                f"model {checkpoint.model!r} has Python code of its own; read it, and if you "
                "trust it, set trust_remote_code: true in the study"
            ) from error
        raise StudyError(
            f"{checkpoint.folder}: transformers cannot use it: {reason(error).split('. ')[0]}; "
            "correct its config.json, or update transformers"
        ) from error
