"""Find and make the transformers class that a checkpoint's config names.

transformers takes seconds to import, so functions import it where needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Auto classes and the tables of their models. Of those that know a config, the first that makes the
# named architecture is taken, else the first.
_GENERATE = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
)
_OTHERS = (
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
)


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that makes the architecture that a config names."""
    import transformers

    named = next(iter(config.architectures or ()), None)
    able = []
    for auto, table in (*_GENERATE, *_OTHERS):
        found = getattr(transformers, table).get(type(config), ())
        classes = found if isinstance(found, tuple) else (found,)
        if named in [each.__name__ for each in classes]:
            return getattr(transformers, auto)
        able += [auto] * bool(classes)
    return getattr(transformers, able[0] if able else "AutoModelForCausalLM")


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the config in a folder.

    It may ask for attention kernels that are another repository's code, or take minutes to compile:
    make its model with ``attn_implementation=None``.

    Raises:
        ValueError: transformers does not know the model, or it needs ``trust_remote_code``.
    """
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code
    )
    return config


def make_without_weights(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Make a config's model on the meta device, which holds no numbers.

    Raises:
        ValueError: transformers cannot make it.
    """
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(
            config,
            dtype=dtype,
            attn_implementation=None,
            trust_remote_code=trust_remote_code,
        )
    return model
