"""A few rows of the architecture table, and what is said of the models that cannot be read."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mechsvd as ms
from tests.architectures import write_checkpoint

RIGHT = ("llama+", "granite", "gpt_neox")
DIFFERENT = (
    "gpt2+scale_attn_weights=false",
    "gemma3_text",
    "falcon+new_decoder_architecture=true,multi_query=false",
)
UNKNOWN = ("phimoe", "bart")


@pytest.fixture(scope="module")
def table():
    """What the command prints of each name: its outcome, and the rest of its line."""
    command = [sys.executable, "-m", "tests.architectures", *RIGHT, *DIFFERENT, *UNKNOWN]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    lines = [re.split(r"\s{2,}", line, maxsplit=2) for line in run.stdout.splitlines()[1:-1]]
    return {name: (outcome, rest) for name, outcome, rest in lines}


@pytest.mark.fault(51, 53)
@pytest.mark.parametrize("name", RIGHT)
def test_a_model_gives_the_numbers_and_texts_of_plain_transformers(table, name):
    assert table[name][0] == "right", table[name]


@pytest.mark.fault(52)
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_model_whose_bridge_computes_something_else_is_refused(table, name):
    assert table[name][0] == "refused", table[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_that_transformerlens_does_not_have_is_refused_as_such(table, name):
    outcome, sentence = table[name]
    assert outcome == "refused"
    assert re.search(r"TransformerLens \S+ has no adapter for the architecture \w+ of", sentence)


def directory(folder, **config):
    """A checkpoint of which only the configuration is read."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["HeliumForCausalLM"], "model_type": "helium"}, "HeliumForCausalLM"),
        ({"architectures": ["MBartForCausalLM"], "model_type": "mbart"}, "MBartForCausalLM"),
        ({"architectures": ["NovelForCausalLM"], "model_type": "novel"}, "NovelForCausalLM"),
        ({"architectures": ["A", "B"], "model_type": "novel"}, "A or B"),
        ({"model_type": "novel"}, "of model type 'novel'"),
    ],
)
def test_the_architecture_without_an_adapter_is_named_before_any_weight_is_read(
    tmp_path, config, named
):
    with pytest.raises(ValueError, match=f"has no adapter for the architecture {named} of this"):
        ms.load_model(directory(tmp_path, **config))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "nonsense"}, "KeyError: 'nonsense'"),
        ({"intermediate_size": -5}, "RuntimeError: .*negative dimension"),
        ({"rope_parameters": {"rope_type": "novel", "rope_theta": 1e4}}, "KeyError: 'novel'"),
    ],
)
def test_what_transformers_cannot_build_is_said_to_be_so(tmp_path, change, reason):
    write_checkpoint("llama", str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "head_dim": None, **change}))
    with pytest.raises(
        ValueError, match=rf"transformers \S+ cannot build the model that {tmp_path} .*{reason}"
    ):
        ms.load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_bigcode+multi_query=false", "AssertionError: .* only supports multi_query=True"),
        ("gpt_neox+attention_bias=false", "AssertionError: assert "),
        ("phi+qk_layernorm=true", "RuntimeError: .*did not declare 'q_norm'"),
    ],
)
def test_what_transformerlens_cannot_read_is_not_called_damage(tmp_path, name, reason):
    assert write_checkpoint(name, str(tmp_path)) == ""
    with pytest.raises(
        ValueError, match=rf"TransformerLens \S+ cannot read the model in {tmp_path}: {reason}"
    ):
        ms.load_model(tmp_path, device="cpu")


def test_loading_a_model_that_reads_images_installs_nothing(tmp_path, monkeypatch):
    """TransformerLens would run `pip install torchvision`, which may replace torch."""
    commands = []
    monkeypatch.setattr(subprocess, "check_call", commands.append)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    recorder = subprocess.check_call
    assert write_checkpoint("gemma3", str(tmp_path)) == ""
    assert ms.load_model(tmp_path, device="cpu").cfg.n_layers == 3
    assert commands == []
    assert subprocess.check_call == recorder


@pytest.mark.parametrize("named", [["GPT2Model"], None, ["GPT2LMHeadModel", "Novel"]])
def test_a_checkpoint_that_names_no_decoder_is_read_by_its_model_type(tmp_path, named):
    write_checkpoint("gpt2", str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": named}))
    assert ms.load_model(tmp_path, device="cpu").cfg.n_layers == 3


def test_what_fails_of_a_hub_model_is_told_and_memory_that_runs_out_stays_that(monkeypatch):
    def fail(error):
        def load(*arguments):
            raise error

        monkeypatch.setattr("mechsvd.model.loading._load", load)

    fail(ValueError("no such model type"))
    with pytest.raises(
        ValueError, match=r"transformers \S+ cannot load 'a/b' from the hub: ValueError: no such"
    ):
        ms.load_model("a/b")
    fail(MemoryError("full"))
    with pytest.raises(MemoryError, match="full"):
        ms.load_model("a/b")
