import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_engine.building.export import CheckpointFiles, write_checkpoint
from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.recipe.recipe import Recipe
from merge_engine.recipe.recipe_file import load_recipe


@pytest.fixture
def source(zoo):
    return Checkpoint(str(zoo / "a"))


@pytest.fixture
def recipe(zoo):
    models = [{"model": str(zoo / "a"), "parameters": {"weight": 1.0}}]
    return Recipe.model_validate({"merge_method": "linear", "models": models})


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_what_is_written_loads_in_transformers_as_it_was(source, recipe, tmp_path, shard_bytes):
    tensors = [(name, source.read(name).bfloat16()) for name in source.tensors]
    out = tmp_path / "out"
    files = CheckpointFiles(source, recipe)
    write_checkpoint(tensors, out, shapes=dict(tensors), files=files, shard_bytes=shard_bytes)
    assert len(list(out.glob("*.safetensors"))) == 1 if shard_bytes > 10**8 else 3
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    live = model.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in tensors)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
    assert (out / "generation_config.json").exists()
    assert load_recipe(out / "mergekit_config.yml")[0] == recipe
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_result_of_a_model_once_quantised_is_not_said_to_be_quantised(source, recipe, tmp_path):
    tensors = {name: source.read(name) for name in source.tensors}
    config = source.config | {"quantization_config": {"quant_method": "fp8"}}
    files = CheckpointFiles(source, recipe, config)
    write_checkpoint(tensors.items(), tmp_path / "out", shapes=tensors, files=files)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_interrupted_write_leaves_no_folder_that_looks_whole(source, recipe, tmp_path):
    def failing():
        yield "model.norm.weight", source.read("model.norm.weight")
        raise OSError("no space left on device")

    shapes = {name: source.read(name) for name in source.tensors}
    files = CheckpointFiles(source, recipe)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(failing(), tmp_path / "out", shapes=shapes, files=files)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_not_overwritten(source, recipe, tmp_path):
    with pytest.raises(MergeError, match="exists; choose another folder"):
        write_checkpoint([], tmp_path, shapes={}, files=CheckpointFiles(source, recipe))


def test_tensors_of_every_width_and_shape_come_back(source, recipe, tmp_path):
    dtypes = (torch.bool, torch.int8, torch.bfloat16, torch.float64, torch.int64, torch.float16)
    tensors = {f"t{i}": torch.arange(3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 4), "é": torch.ones(2, 1).T}
    files = CheckpointFiles(source, recipe)
    write_checkpoint(reversed(tensors.items()), tmp_path / "out", shapes=tensors, files=files)
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


OWN_MODEL = """
from transformers import LlamaForCausalLM

class MyModel(LlamaForCausalLM):
    pass
"""


def test_model_with_python_files_of_its_own_loads_from_what_is_built(zoo, tmp_path, build):
    shutil.copytree(zoo / "a", model := tmp_path / "own")
    (model / "modeling_mine.py").write_text(OWN_MODEL)
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoModelForCausalLM": "modeling_mine.MyModel"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    models = [{"model": str(model), "parameters": {"weight": 1.0}}]
    build({"merge_method": "linear", "models": models}, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "MyModel"


@pytest.mark.parametrize("replaced", [False, True])
def test_every_file_of_tokenizer_and_processor_is_written(zoo, recipe, tmp_path, replaced):
    shutil.copytree(zoo / "a", folder := tmp_path / "model")
    processor = ["preprocessor_config.json", "processor_config.json"]
    processor += ["video_preprocessor_config.json"]
    tokenizer = ["spiece.model", "sentencepiece.bpe.model", "source.spm", "qwen.tiktoken"]
    tokenizer += ["vocab.txt", "additional_chat_templates/tool.jinja"]
    (folder / "additional_chat_templates").mkdir()
    for name in (*processor, *tokenizer, "model.gguf", "modeling_mine.py", "README.md"):
        (folder / name).write_text("{}")
    source = Checkpoint(str(folder))
    other = AutoTokenizer.from_pretrained(zoo / "b") if replaced else None
    files = CheckpointFiles(source, recipe, tokenizer=other)
    tensors = {name: source.read(name) for name in source.tensors}
    write_checkpoint(tensors.items(), tmp_path / "out", shapes=tensors, files=files)
    written = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*")}
    assert written >= {*processor}
    assert written.isdisjoint({"model.gguf", "modeling_mine.py", "README.md"})
    assert written.isdisjoint(tokenizer) if replaced else written >= {*tokenizer}


PEAKS = """
import sys
from pathlib import Path
from search.cli import main
peaks = []
for folder in sys.argv[1:]:
    main(["build", folder + "/r.yaml", folder + "/out", "--device", "cpu"])
    status = Path("/proc/self/status").read_text().split()
    peaks.append(status[status.index("VmHWM:") + 1])
print(*peaks)
"""


def write_models(folder, layers):
    """A recipe of two models with 4 MiB per layer."""
    for number, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
        (folder / name / "config.json").write_text(json.dumps(config))
        weights = {
            f"model.layers.{i}.mlp.up_proj.weight": torch.full((1024, 1024), i + 0.5 + number)
            for i in range(layers)
        }
        save_file(weights, folder / name / "model.safetensors")
    (folder / "r.yaml").write_text(
        "merge_method: ties\nbase_model: a\nparameters: {weight: 0.5}\nmodels: [{model: b}]\n"
    )
    return str(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_build_does_not_grow_with_the_layers(tmp_path):
    folders = [write_models(tmp_path / str(layers), layers) for layers in (12, 48)]
    # What malloc keeps for later is not counted: every tensor is given back when it is freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PEAKS, *folders]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    few, many = map(int, result.stdout.splitlines()[-1].split())
    assert many <= 1.1 * few
