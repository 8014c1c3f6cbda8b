"""Models whose best subspace is known: all that is read of the writes lies in a planted one, or d_model is 8."""

import torch

import mechsvd as ms

from .conftest import tiny

READING = ("q_proj", "k_proj", "v_proj", "gate", "up")


def planted(rank=6, seed=0, whitened_on=()):
    """A Llama that reads a random subspace of the residual stream only, and that subspace.

    With tasks to whiten on, only its unembedding reads no more than that, and the writes of its last
    MLP are as large in every direction.

    Its norms hardly see the size of the stream, since their epsilon is huge.
    """
    import transformers as hf

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 256}
    config = hf.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=None, rms_norm_eps=1e8,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    basis = ms.random_subspace(32, rank, seed).basis.float()
    everywhere = not whitened_on
    # so that writes are about as large as the embedding, whatever they read
    size = 0.4 if everywhere else 0.18
    spread = {"embed": 1.0, "v_proj": size, "o_proj": 0.3, "gate": size, "up": size, "down": 0.15}
    for name, parameter in model.named_parameters():
        std = next((own for part, own in spread.items() if part in name), 0.3)
        torch.nn.init.normal_(parameter, std=std)
        if "norm" in name:
            parameter.data.fill_(1e4)
        elif "lm_head" in name or (everywhere and any(part in name for part in READING)):
            parameter.data = parameter.data @ basis @ basis.T
    bridge = tiny("Llama", model)
    if whitened_on:
        last = ms.collect_writes(bridge, whitened_on, layers=[1], components=["mlp"]).values[0]
        values, vectors = torch.linalg.eigh(last.T.double() @ last.double() / len(last))
        root = (vectors / values.sqrt()) @ vectors.T
        model.model.layers[1].mlp.down_proj.weight.data.copy_(
            root @ model.model.layers[1].mlp.down_proj.weight.double()
        )
    return bridge, ms.Subspace(basis)


def with_eight_dimensions():
    """A random Llama with d_model 8, so that all subsets of directions can be tried."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=8, intermediate_size=16, vocab_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=None,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4 if parameter.ndim > 1 else 1.0)
    return tiny("Llama", model)


def divergence(model, task, edit_of):
    """The oracle: KL of clean ‖ edited per token, by one plain run each, in float64."""

    def run(hooks):
        with torch.no_grad():
            logits = model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)
        return logits[0, task.prompt_length - 1 : -1].double().log_softmax(-1)

    names = [site.hook_name for site in ms.find_sites(model)]
    hooks = [(name, edit_of(i)) for i, name in enumerate(names)]
    clean, edited = run([]), run(hooks)
    return float((clean.exp() * (clean - edited)).sum(-1).mean())


def projecting(basis):
    """A dense projection, as a hook."""
    projector = (basis.double() @ basis.double().T).float()
    return lambda _: lambda x, hook=None: x @ projector
