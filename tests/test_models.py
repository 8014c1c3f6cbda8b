import json
import shutil

import pytest
import torch

import mechsvd as ms
from mechsvd.demo import WEIGHTS
from mechsvd.model.identity import fingerprint, model_name, processing_state, provenance_of
from tests.conftest import tiny


def test_the_embedded_model_a_directory_and_a_model_load_alike(embedded):
    local = ms.load_model(WEIGHTS, device="cpu")
    assert fingerprint(local) == fingerprint(embedded)
    assert ms.load_model(local) is local
    assert model_name(embedded) == "mechsvd embedded"
    assert next(embedded.parameters()).dtype == torch.float32


def test_dtype_and_device_do_what_they_say():
    model = ms.load_model(dtype=torch.bfloat16, device="cpu")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert provenance_of(model).dtype == "bfloat16"


def test_a_fingerprint_changes_with_any_weight_and_is_never_stale():
    model = tiny("Llama")
    before = fingerprint(model)
    assert fingerprint(tiny("Llama")) == before
    with torch.no_grad():
        weight = model.blocks[1].mlp.out.weight
        weight[3, 7] = torch.nextafter(weight[3, 7], torch.tensor(9.0))
    assert fingerprint(model) != before


@pytest.mark.older
def test_a_fingerprint_is_the_same_in_every_version_of_transformerlens(embedded):
    assert (
        fingerprint(embedded) == "8b20000c06dc1994"
    )  # 3.9 has other names, and a zero bias at the unembedding


def test_the_processing_state_is_told():
    model = tiny("GPT-2")
    assert processing_state(model) == "raw"
    model.enable_compatibility_mode(disable_warnings=True)
    assert "compatibility mode" in processing_state(model)
    assert "writing weights centred" in processing_state(model)


@pytest.mark.fault(39)
def test_a_directory_that_is_no_model_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"is not a Hugging Face model: config\.json is missing"):
        ms.load_model(tmp_path)
    shutil.copy(WEIGHTS / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"has no weights: model\.safetensors is missing"):
        ms.load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model\.bin\).*allow_pickle=True"):
        ms.load_model(tmp_path)


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(WEIGHTS, tmp_path / "model")


def test_a_local_directory_is_named_by_its_last_part_and_not_by_its_path(checkpoint):
    assert model_name(ms.load_model(checkpoint, device="cpu")) == "model"


@pytest.mark.fault(39)
def test_truncated_weights_name_the_file(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"cannot be loaded; is its model\.safetensors or config\.json damaged"
    ):
        ms.load_model(checkpoint, device="cpu")


@pytest.mark.fault(39)
def test_missing_weights_are_refused_and_not_filled_with_random_numbers(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"holds 1,193,600 weights, but its model has 1,238,656; missing: \['model.layers.2.mlp.up_proj",
    ):
        ms.load_model(checkpoint, device="cpu")


@pytest.mark.fault(39)
def test_weights_of_the_wrong_shape_name_the_file(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 300}))
    with pytest.raises(
        ValueError, match=r"cannot be loaded; is its model\.safetensors or config\.json damaged"
    ):
        ms.load_model(checkpoint, device="cpu")


@pytest.mark.fault(39)
def test_a_garbled_config_names_the_file(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json damaged"):
        ms.load_model(checkpoint, device="cpu")


@pytest.mark.fault(32)
def test_other_safetensors_do_not_let_pickles_pass(tmp_path):
    shutil.copy(WEIGHTS / "config.json", tmp_path)
    shutil.copy(WEIGHTS / "model.safetensors", tmp_path / "optimizer.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="pickles"):
        ms.load_model(tmp_path)


def test_a_device_that_is_not_here_and_a_path_that_is_none_are_not_called_damage():
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"Device 'cuda' cannot be used here.*'cpu' always can"
        ):
            ms.load_model(device="cuda")
    with pytest.raises(ValueError, match="Device 'foo' cannot be used here"):
        ms.load_model(device="foo")
    with pytest.raises(ValueError, match=r"There is no directory \./nowhere"):
        ms.load_model("./nowhere")


def test_options_for_a_model_that_is_loaded_already_are_refused(embedded):
    with pytest.raises(ValueError, match="loaded already"):
        ms.load_model(embedded, device="cpu")
    with pytest.raises(ValueError, match="loaded already"):
        ms.load_model(embedded, dtype=torch.bfloat16)  # it would stay in float32 without a word


@pytest.mark.fault(38)
def test_a_hub_model_out_of_reach_says_the_ways_out():
    with pytest.raises(
        OSError,
        match=r"Cannot load 'nobody/nothing' from the hub.*HF_TOKEN.*local directory.*embedded model",
    ):
        ms.load_model("nobody/nothing")


def test_what_is_no_model_is_refused():
    for wrong in (None, 3, ""):
        with pytest.raises(
            TypeError, match="`model` must be a name, a directory or a TransformerLens model"
        ):
            ms.load_model(wrong)


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("3.8.1", "3.8.1 is installed"),
        ("5.0.0", "5.0.0 is installed"),
        ("not installed", "not installed"),
    ],
)
def test_a_missing_or_unsupported_transformerlens_gives_the_exact_line(monkeypatch, found, message):
    monkeypatch.setattr("mechsvd.model.loading.installed_version", lambda: found)
    with pytest.raises(ImportError, match=rf"{message}.*pip install 'transformer-lens>=3.9,<5'"):
        ms.load_model()


@pytest.mark.parametrize("option", ["fold_ln", "center_writing_weights", "n_devises"])
def test_an_option_that_the_bridge_does_not_have_is_named_and_no_file_is_blamed(option):
    with pytest.raises(TypeError, match=f"boot_transformers` refuses the options: .*'{option}'"):
        ms.load_model(**{option: True})
