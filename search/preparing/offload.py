"""A live model whose weights stay in host memory while its forward passes run on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from objectives.entries import PluginEntry
from search.study.spec import StudyError, StudySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_offload(spec: StudySpec, device: str) -> None:
    """Refuse studies that need the weights to stay in the live model between forward passes.

    Raises:
        StudyError: The live model is to be spread over several GPUs, an objective is the user's own
            class, which gets the model itself, or weights are to be tuned.
    """
    if spec.search.tune is True:
        raise StudyError(
            "--offload: search.tune is true, but between forward passes the live model has no "
            "weights to go backward through; leave one of the two out"
        )
    if device == "auto":
        raise StudyError("--offload copies layers to one device; name it, as in --device cuda:0")
    own = [entry.objective for entry in spec.objective.tasks if isinstance(entry, PluginEntry)]
    if own:
        raise StudyError(
            f"--offload: objective {own[0]!r} is a class of your own, which gets the live model "
            "itself, and between forward passes that has no weights; leave out --offload"
        )


def offload(model: PreTrainedModel, device: str) -> None:
    """Run a model's forward passes on a device, copying each layer's weights there for its turn.

    The weights stay in host memory, and each pass reads what was written there last: make the
    ``Builder`` first, so that it writes to them. Between passes the model's own tensors are on the
    meta device.

    Raises:
        StudyError: The model reads weights outside the layers that accelerate brings them for.
    """
    from accelerate import cpu_offload

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = {type(layer).__name__ for stack in stacks for layer in stack}
    try:
        cpu_offload(
            model,
            torch.device(device),
            offload_buffers=True,  # recipes write those that are stored
            state_dict=model.state_dict(),
            # some read a submodule's weights without calling it
            preload_module_classes=sorted(layers),
        )
        tokens = torch.ones(1, 2, dtype=torch.long)
        decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            model(tokens, **decoder)
    except (RuntimeError, ValueError) as error:
        raise StudyError(
            f"--offload: accelerate cannot bring a {type(model).__name__} its weights layer by "
            f"layer ({type(error).__name__}); leave out --offload"
        ) from error
    # where it runs, in transformers' own attribute
    model.hf_device_map = {"": torch.device(device)}  # type: ignore[assignment]
