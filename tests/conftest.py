"""Models for the tests: the embedded one, a real small one beside the project, and tiny random ones of many architectures."""

import functools
import gc
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core; processes of the tests inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network is needed; a hub name must fail at once

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
collect_ignore = ["benchmarks"]  # run by hand, on an idle machine
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
KNOWN: set = set()  # classes of models
REAL = ["embedded", *(["stories260k"] if STORIES.is_dir() else [])]  # trained models at hand


@pytest.fixture(scope="session", autouse=True)
def quiet():
    from mechsvd.model import cache

    logging.getLogger("transformers").setLevel(logging.ERROR)
    cache._WARNED.add("dropped")  # of versions, said once; test_dependencies has it


class Real(NamedTuple):
    """A trained model, a task for it with the decomposition of its writes, and the directory of its weights."""

    name: str
    model: Any
    prompt: str
    task: Any
    svd: Any
    directory: Path

    @property
    def d_model(self):
        return self.model.cfg.d_model

    @property
    def n_layers(self):
        return self.model.cfg.n_layers


@functools.cache
def load_real(name):
    import mechsvd as ms
    from mechsvd.demo import WEIGHTS

    directory, prompt, length = {
        "embedded": (WEIGHTS, ms.SHORTFORM_PROMPTS["meaning"], 12),
        "stories260k": (STORIES, "Once upon a time, there was", 20),
    }[name]
    model = known(ms.load_model(directory, device="cpu"))
    task = ms.Task.from_text(model, prompt, max_new_tokens=length)
    svd = ms.decompose(ms.collect_writes(model, task))
    return Real(name, model, prompt, task, svd, directory)


def known(model):
    """A model, once it is seen to have all that `Model` asks for.

    The shape checks ask a class that is registered once, and not each model a million times.
    """
    if type(model) not in KNOWN:
        from mechsvd.model.sites import Model

        if not isinstance(model, Model):
            raise TypeError("this TransformerLens lacks something that mechsvd needs")
        Model.register(type(model))
        KNOWN.add(type(model))
        gc.freeze()  # all is imported now: the collector need not go through it again and again
    return model


@pytest.fixture(scope="module", params=REAL)
def real(request):
    """Each of the trained models: the embedded one always, and stories260k where it is."""
    return load_real(request.param)


@pytest.fixture(scope="session")
def embedded():
    return load_real("embedded").model


@pytest.fixture(scope="session")
def meaning():
    return load_real("embedded").task


@pytest.fixture(scope="session")
def meaning_svd():
    return load_real("embedded").svd


@pytest.fixture
def plain():
    """The embedded model as transformers loads it, without TransformerLens."""
    from transformers import AutoModelForCausalLM

    from mechsvd.demo import WEIGHTS

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, **options).requires_grad_(False)


class Reference:
    """A Llama in float64 whose attention and MLP outputs are seen, and replaced, at their output projections."""

    def __init__(self, directory, tokens, prompt_length):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager"
        ).requires_grad_(False)
        self.tokens, self.prompt_length = tokens, prompt_length
        layers = self.model.model.layers
        self.outputs = [
            module for layer in layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]

    def run(self, edit):
        attempted, kept = [], []

        def hook(module, inputs, output):
            edited = edit(output)
            attempted.append(output[0])
            kept.append(edited[0])
            return edited

        handles = [module.register_forward_hook(hook) for module in self.outputs]
        with torch.no_grad():
            log_probs = self.model(self.tokens[None]).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        scored = [
            log_probs[i - 1, self.tokens[i]].item()
            for i in range(self.prompt_length, len(self.tokens))
        ]
        return sum(scored), torch.stack(attempted), torch.stack(kept)


@pytest.fixture(scope="module")
def reference(real):
    """The same model without TransformerLens and without mechsvd, for the same task."""
    return Reference(real.directory, real.task.tokens, real.task.prompt_length)


@pytest.fixture
def silent():
    """For tests in which a warning is not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _configurations():
    import transformers as hf

    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    grouped = {**sizes, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": None}
    gemma = {**grouped, "head_dim": 8, "query_pre_attn_scalar": 8}
    named = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return {
        "GPT-2": lambda: hf.GPT2Config(**named),
        "Llama": lambda: hf.LlamaConfig(**grouped),
        "Mistral": lambda: hf.MistralConfig(**grouped),
        "Qwen2": lambda: hf.Qwen2Config(**grouped),
        "Gemma-2": lambda: hf.Gemma2Config(**gemma),
        "GPT-NeoX": lambda: hf.GPTNeoXConfig(**sizes, intermediate_size=64),
        "OLMo-2": lambda: hf.Olmo2Config(**grouped),
        "Phi": lambda: hf.PhiConfig(**sizes, intermediate_size=64),
        "GPT-J": lambda: hf.GPTJConfig(**named, rotary_dim=4),
        "OPT": lambda: hf.OPTConfig(**{**sizes, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        "Bloom": lambda: hf.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4),
        "Lfm2": lambda: hf.Lfm2Config(**grouped, layer_types=["conv", "full_attention"]),
        "Mamba": lambda: hf.MambaConfig(
            vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4
        ),
    }


ACCEPTED = [
    "GPT-2",
    "Llama",
    "Mistral",
    "Qwen2",
    "Gemma-2",
    "GPT-NeoX",
    "OLMo-2",
    "Phi",
    "GPT-J",
    "OPT",
    "Bloom",
]


def tiny_hf(architecture):
    """A random model of two layers."""
    return random_weights(_configurations()[architecture]())


def random_weights(config):
    """A random model, its biases and norms random too, so that nothing is right by being zero."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model


def tiny(architecture, hf_model=None):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from mechsvd.demo import WEIGHTS

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    options = {"hf_model": hf_model or tiny_hf(architecture), "tokenizer": tokenizer}
    return known(TransformerBridge.boot_transformers(architecture, device="cpu", **options))


def tiny_task(length=9, prompt_length=5, seed=0):
    import mechsvd as ms

    generator = torch.Generator().manual_seed(seed)
    return ms.Task(
        tokens=torch.cat(
            [torch.tensor([0]), torch.randint(2, 256, (length - 1,), generator=generator)]
        ),
        prompt_length=prompt_length,
    )


def finishes(change, event, steps):
    """Whether a change is done by a process that is killed before its n-th step of these kinds."""
    child = os.fork()
    if child == 0:
        left = iter(range(event))

        def count(name, _):
            if name in steps and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        change()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def loop_log_prob(model, task, edit_of_site, layers, components=("attn", "mlp")):
    """The oracle: one plain `run_with_hooks` with a dense map for each edit."""
    hooks = [(f"blocks.{layer}.hook_{c}_out", edit_of_site) for layer in layers for c in components]
    with torch.no_grad():
        logits = model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)
    return (
        logits[0, task.prompt_length - 1 : -1]
        .double()
        .log_softmax(-1)
        .gather(-1, task.continuation[:, None])[:, 0]
    )
