"""Models of several shapes with random weights, for the benchmarks: nothing is downloaded."""

import tempfile
from pathlib import Path

import torch

import mechsvd as ms

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


def random_model(shape, **changes):
    """A model of a shape that everybody knows: "gpt2", "pythia" (160M) or "llama" (d_model 512)."""
    with tempfile.TemporaryDirectory() as directory:
        save_random(shape, directory, **changes)
        model = ms.load_model(directory, device="cpu")
    model.cfg.model_name = f"random {shape}"
    return model


def save_random(shape, directory, **changes):
    """Write a checkpoint of random weights, and the embedded model's tokenizer."""
    import transformers as hf

    torch.manual_seed(0)
    configurations = {
        "gpt2": lambda: hf.GPT2Config(**changes),
        "pythia": lambda: hf.GPTNeoXConfig(
            **{
                "vocab_size": 50304,
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "rotary_pct": 0.25,
                "max_position_embeddings": 2048,
                **changes,
            }
        ),
        "llama": lambda: hf.LlamaConfig(
            **{
                "vocab_size": 1000,
                "hidden_size": 512,
                "intermediate_size": 1376,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "max_position_embeddings": 2048,
                **changes,
            }
        ),
    }
    hf.AutoModelForCausalLM.from_config(configurations[shape]()).save_pretrained(directory)
    tokenizer = hf.AutoTokenizer.from_pretrained(Path(ms.__file__).parent / "demo" / "weights")
    tokenizer.save_pretrained(directory)


def random_task(length, prompt_length, seed=0):
    """Random tokens after a BOS token."""
    tokens = torch.randint(3, 1000, (length - 1,), generator=torch.Generator().manual_seed(seed))
    return ms.Task(torch.cat([torch.tensor([0]), tokens]), prompt_length)


def flops(model, task):
    """FLOPs of a forward pass over a task: matrix products, attention, and the scored logits."""
    cfg, length, scored = model.cfg, len(task.tokens), len(task.continuation)
    heads_share = (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) / cfg.n_heads
    matrices = 3 if getattr(cfg, "gated_mlp", False) else 2
    weights = 2 * (1 + heads_share) * cfg.d_model**2 + matrices * cfg.d_model * cfg.d_mlp
    block = 2 * weights * length + 4 * length**2 * cfg.d_model
    return cfg.n_layers * block + 2 * cfg.d_model * cfg.d_vocab * scored
