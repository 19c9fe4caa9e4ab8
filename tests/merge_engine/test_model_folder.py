import json

import pytest
from transformers import LlamaForCausalLM

from merge_engine.errors import MergeError
from merge_engine.models.checkpoint import Checkpoint
from merge_engine.models.model_folder import find_adapter, find_weights
from tiny_models import make_llama, pickled_twin

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def test_files_are_chosen_in_the_order_of_transformers(tmp_path):
    for name in ORDER:
        if name.endswith("json"):
            weight_map = {"a": f"1-{name.removesuffix('.index.json')}"}
            (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))
            (tmp_path / weight_map["a"]).touch()
        else:
            (tmp_path / name).touch()
    for name in ORDER:
        found = find_weights(tmp_path)
        single = found.index is None
        assert (found.files[0] if single else found.index) == tmp_path / name
        (tmp_path / name).unlink()
    assert find_weights(tmp_path) is None


def test_index_left_of_an_earlier_save_does_not_matter(make_model, tmp_path):
    folder = make_model(tmp_path / "m", seed=0, shard_size="20KB")
    model = LlamaForCausalLM.from_pretrained(folder)
    index = (folder / "model.safetensors.index.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_bytes(index)
    found = Checkpoint(str(folder))
    assert found.tensors.keys() == model.state_dict().keys()


def test_safetensors_win_over_bin(zoo, tmp_path):
    folder = pickled_twin(zoo / "a", tmp_path / "m")
    make_llama(folder, seed=5)
    assert {info.file.name for info in Checkpoint(str(folder)).tensors.values()} == {ORDER[0]}


def test_adapter_is_read_from_bin_if_that_is_all(tmp_path):
    assert find_adapter(tmp_path).name == "adapter_model.safetensors"
    (tmp_path / "adapter_model.bin").touch()
    assert find_adapter(tmp_path).name == "adapter_model.bin"
    (tmp_path / "adapter_model.safetensors").touch()
    assert find_adapter(tmp_path).name == "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-q4.gguf"], "it holds model-q4.gguf, which is in the GGUF format"),
        (["consolidated.00.pth"], "consolidated.00.pth, in its authors' own format"),
        (["original/consolidated.safetensors"], "original/consolidated.safetensors, in its auth"),
        (["checkpoint-5/x.bin", "checkpoint-20/x.bin"], "name .*/checkpoint-20$"),
        (["snapshots/abc/config.json", "refs/main"], "hub's cache: name .*/snapshots/abc$"),
        (["global_step5/zero_pp_rank_0_optim_states.pt"], "DeepSpeed ZeRO .* zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "FSDP .* `accelerate merge-weights`"),
        (["tf_model.h5"], "tf_model.h5, of another framework"),
        (["model-00001-of-00002.safetensors"], "without the index"),
        (["weights.pt"], "it holds weights.pt, which is not a weight file's name"),
        (["adapter_config.json"], "it is an adapter: name it with its base, as 'BASE\\+"),
        ([], "fetch it again"),
    ],
)
def test_folder_without_weights_is_refused_by_what_it_holds(tmp_path, files, message):
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    with pytest.raises(MergeError, match=message) as caught:
        Checkpoint(str(tmp_path)).tensors  # noqa: B018
    assert "no model.safetensors or pytorch_model.bin in" in str(caught.value)
