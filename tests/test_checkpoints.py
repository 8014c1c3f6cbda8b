"""Every way into `load_model` opens a checkpoint's own safetensors and nothing else: with real files that leave traces."""

import json
import shutil
import sys
import threading

import pytest
import torch

import mechsvd as ms
from mechsvd.demo import WEIGHTS
from mechsvd.model.checkpoints import only_trusted
from tests.conftest import tiny_hf

OPTIONS = [
    {},
    {"n_ctx": 32},
    {"trust_remote_code": True},
    {"hf_config_overrides": {"initializer_range": 0.1}},
]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"


class Trace:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "llama"
    tiny_hf("Llama").save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copy(WEIGHTS / name, directory)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "llama")


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace"


def pickle_instead(directory, trace=None):
    """The same weights as a pickle, which transformers opens, or a pickle that leaves a trace."""
    from safetensors.torch import load_file

    weights = load_file(directory / "model.safetensors")
    torch.save(Trace(trace) if trace else weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return dict.fromkeys(weights, "pytorch_model.bin")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def leave_trace(path, trace):
    names = "LlamaForCausalLM OpenELMForCausalLM XConfig XForCausalLM XTokenizer"
    path.write_text(
        f"open({str(trace)!r}, 'w')\n" + "".join(f"class {name}: pass\n" for name in names.split())
    )


def refused(directory, match, **options):
    with pytest.raises(ValueError, match=match):
        ms.load_model(directory, device="cpu", **options)


@pytest.mark.fault(48)
@pytest.mark.older
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_index_that_points_to_pickles_is_refused_whatever_the_options(checkpoint, options):
    places = pickle_instead(checkpoint)
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    refused(
        checkpoint,
        r"llama holds its weights as pickles \(pytorch_model\.bin\).*`allow_pickle=True`",
        **options,
    )
    assert ms.load_model(checkpoint, device="cpu", allow_pickle=True).cfg.n_layers == 2


@pytest.mark.fault(32)
@pytest.mark.older
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_pickle_leaves_no_trace_whatever_the_options(checkpoint, trace, options):
    pickle_instead(checkpoint, trace)
    refused(checkpoint, "as pickles", **options)
    (checkpoint / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    )
    refused(checkpoint, "as pickles", **options)
    assert not trace.exists()


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ("../elsewhere.safetensors", r"names weights outside of its folder \(\.\./elsewhere"),
        ("/tmp/elsewhere.safetensors", "outside of its folder"),
        ("sub/../../elsewhere.safetensors", "outside of its folder"),
        (5, "cannot be loaded.*must hold a `weight_map` from weights to names of files"),
        (None, "cannot be loaded.*must hold a `weight_map`"),
        (["model.safetensors"], "cannot be loaded.*must hold a `weight_map`"),
    ],
)
def test_an_index_names_files_of_its_own_folder(checkpoint, places, message):
    shutil.move(checkpoint / "model.safetensors", checkpoint.parent / "elsewhere.safetensors")
    (checkpoint / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": places}})
    )
    refused(checkpoint, message)
    refused(checkpoint, message, n_ctx=32)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_shards_load_under_any_name_and_missing_weights_are_missed_with_any_option(
    checkpoint, options
):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    places = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(weights)}
    for part in set(places.values()):
        save_file(
            {n: w for n, w in weights.items() if places[n] == part},
            checkpoint / part,
            metadata={"format": "pt"},
        )
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert ms.load_model(checkpoint, device="cpu", **options).cfg.n_layers == 2
    save_file({}, checkpoint / "part-1.safetensors", metadata={"format": "pt"})
    refused(checkpoint, "weights, but its model has .*; missing: ", **options)


def test_the_configuration_does_not_choose_a_pickle(checkpoint):
    pickle_instead(checkpoint)
    shutil.move(checkpoint / "pytorch_model.bin", checkpoint / "adapter_model.bin")
    shutil.copy(WEIGHTS / "model.safetensors", checkpoint)
    change(checkpoint / "config.json", transformers_weights="adapter_model.bin")
    refused(checkpoint, r"as pickles \(adapter_model\.bin\)", n_ctx=32)
    change(checkpoint / "config.json", transformers_weights=None)
    refused(
        checkpoint,
        r"as pickles",
        hf_config_overrides={"transformers_weights": "adapter_model.bin"},
        load_weights=True,
    )


def test_an_adapter_is_refused_for_it_names_weights_elsewhere(checkpoint):
    (checkpoint / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "nobody/pickles"})
    )
    refused(checkpoint, r"holds an adapter \(adapter_config\.json\).*merge it into its base model")


def test_an_architecture_for_which_transformerlens_opens_pickles_does_not(tmp_path):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {
        "vocab_size": 256,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_experts": 2,
    }
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, num_decoder_layers=2)
    )
    model.save_pretrained(tmp_path / "switch")
    torch.save(
        model.state_dict(), tmp_path / "switch" / "pytorch_model.bin"
    )  # opened even where safetensors lie beside it
    for name in TOKENIZER:
        shutil.copy(WEIGHTS / name, tmp_path / "switch")
    with (
        pytest.raises(ValueError, match="as pickles"),
        only_trusted("switch", pickles=False, code=False),
    ):
        boot(tmp_path / "switch")


def boot(directory):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(directory), device="cpu")


@pytest.mark.fault(48)
@pytest.mark.older
def test_code_that_a_configuration_names_never_runs(checkpoint, trace):
    leave_trace(checkpoint / "modeling_x.py", trace)
    names = {
        "AutoConfig": "modeling_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.LlamaForCausalLM",
    }
    change(checkpoint / "config.json", auto_map=names, trust_remote_code=True)
    change(
        checkpoint / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["modeling_x.XTokenizer", None]},
        trust_remote_code=True,
    )
    ms.load_model(checkpoint, device="cpu")  # transformers has classes of its own for it
    change(checkpoint / "tokenizer_config.json", tokenizer_class="XTokenizer")
    change(checkpoint / "config.json", model_type="x")
    for options in ({}, {"n_ctx": 32}):
        refused(checkpoint, r"llama needs code of its own.*`trust_remote_code=True`", **options)
    assert not trace.exists()


@pytest.mark.older
def test_code_is_not_asked_for_on_the_terminal_either(checkpoint, trace, monkeypatch):
    leave_trace(checkpoint / "modeling_x.py", trace)
    change(
        checkpoint / "config.json",
        model_type="clip_text_model",
        auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"},
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for options in ({}, {"n_ctx": 32}):
        refused(checkpoint, "needs code of its own", **options)
    assert not trace.exists()


@pytest.mark.fault(48)
@pytest.mark.older
def test_code_that_transformerlens_imports_without_asking_never_runs(checkpoint, trace):
    leave_trace(checkpoint / "modeling_openelm.py", trace)
    change(checkpoint / "config.json", architectures=["OpenELMForCausalLM"])
    for options in ({}, {"n_ctx": 32}, {"allow_pickle": True}):
        refused(checkpoint, "needs code of its own", **options)
    assert not trace.exists()


def test_the_users_own_word_runs_code(checkpoint, trace):
    leave_trace(checkpoint / "modeling_x.py", trace)
    change(
        checkpoint / "config.json", model_type="x", auto_map={"AutoConfig": "modeling_x.XConfig"}
    )
    with pytest.raises(Exception, match="XConfig"):  # which is no configuration; but it ran
        ms.load_model(checkpoint, device="cpu", trust_remote_code=True)
    assert trace.exists()


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A cache as the hub leaves it: safetensors at `main`, a pickle and an index of one at other revisions."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--somebody--llama"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("pickled", "b" * 40), ("indexed", "c" * 40)):
        (repository / "refs" / revision).write_text(commit)
        snapshot = shutil.copytree(saved, repository / "snapshots" / commit)
        if revision != "main":
            places = pickle_instead(snapshot)
        if revision == "indexed":
            (snapshot / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "somebody/llama"


@pytest.mark.fault(48)
def test_a_hub_model_passes_the_same_gate_at_the_revision_that_is_asked_for(hub):
    assert ms.load_model(hub, device="cpu").cfg.n_layers == 2
    for revision in ("pickled", "indexed"):
        refused(
            hub,
            r"somebody/llama holds its weights as pickles \(pytorch_model\.bin\)",
            revision=revision,
        )
    assert ms.load_model(hub, device="cpu", revision="pickled", allow_pickle=True).cfg.n_layers == 2


def test_a_directory_with_the_name_of_an_alias_is_the_one_that_loads(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "gpt2-small")
    monkeypatch.chdir(tmp_path)
    assert ms.load_model("gpt2-small", device="cpu").cfg.d_model == 32
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02")
    refused("weights.bin", r"There is no directory weights\.bin")


def test_the_refusal_is_for_this_load_alone(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "mine.pt")
    loaded = []
    with only_trusted("a model", pickles=False, code=False):
        other = threading.Thread(target=lambda: loaded.append(torch.load(tmp_path / "mine.pt")))
        other.start()
        other.join()
    assert loaded
    assert torch.load(tmp_path / "mine.pt")["a"].sum() == 2
    assert sys.modules["transformers"].dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0
