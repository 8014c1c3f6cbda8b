"""Models for the tests: the embedded one, a real small one beside the project, and tiny random ones of many architectures."""

import logging
import os
import warnings
from pathlib import Path

import pytest
import torch

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # the tests need no network; a hub name must fail at once
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"


@pytest.fixture(scope="session", autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def embedded():
    import mechsvd as ms

    return ms.load_model(device="cpu")


@pytest.fixture(scope="session")
def stories():
    import mechsvd as ms

    if not STORIES.is_dir():
        pytest.skip(f"the real model stories260k is not in {STORIES.parent}")
    return ms.load_model(STORIES, device="cpu")


@pytest.fixture(scope="session")
def story_task(stories):
    import mechsvd as ms

    return ms.Task.from_text(stories, "Once upon a time, there was", max_new_tokens=20)


@pytest.fixture(scope="session")
def meaning(embedded):
    import mechsvd as ms

    return ms.Task.from_text(embedded, ms.SHORTFORM_PROMPTS["meaning"], max_new_tokens=12)


@pytest.fixture(scope="session")
def meaning_svd(embedded, meaning):
    import mechsvd as ms

    return ms.decompose(ms.collect_writes(embedded, meaning))


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
    """A random model of two layers, its biases and norms random too, so that nothing is right by being zero."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        _configurations()[architecture](), attn_implementation="eager"
    ).eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model


def tiny(architecture, hf_model=None):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from mechsvd.demo import WEIGHTS

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    return TransformerBridge.boot_transformers(
        architecture, hf_model=hf_model or tiny_hf(architecture), tokenizer=tokenizer, device="cpu"
    )


def tiny_task(length=9, prompt_length=5, seed=0):
    import mechsvd as ms

    generator = torch.Generator().manual_seed(seed)
    return ms.Task(
        tokens=torch.cat(
            [torch.tensor([0]), torch.randint(2, 256, (length - 1,), generator=generator)]
        ),
        prompt_length=prompt_length,
    )


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
