"""Dictionaries that SAELens splices into a HookedTransformer (transformer-lens 3.9; sae-lens needs a version below 4).

The stand-in has SAELens's hook names; the same tests run on SAELens itself where it is installed.
"""

import pytest
import torch
from torch import nn

import mechsvd as ms
from tests.conftest import tiny_task

pytestmark = pytest.mark.older

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.hook_points import HookPoint
except ImportError:
    pytest.skip("HookedTransformer left TransformerLens with 4.0", allow_module_level=True)

WRITE, STREAM = "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"
CONFIG = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_ctx": 64}
CONFIG |= {"d_vocab": 256, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}


class StandIn(nn.Module):
    """A dictionary with random weights under the hook names of SAELens."""

    def __init__(self, size):
        super().__init__()
        self.hook_sae_input, self.hook_sae_acts_post = HookPoint(), HookPoint()
        self.hook_sae_output = HookPoint()
        generator = torch.Generator().manual_seed(0)
        self.__dict__["weights"] = torch.randn(2, 32, size, generator=generator) / 6  # no parameter

    def forward(self, x):
        encoder, decoder = self.weights
        acts = self.hook_sae_acts_post((self.hook_sae_input(x) @ encoder).relu())
        return self.hook_sae_output(acts @ decoder.mT)


def stand_in_model():
    return HookedTransformer(HookedTransformerConfig(**CONFIG)).eval()


def splice_stand_in(model, name, size):
    block, point = name.split(".")[1:]
    setattr(model.blocks[int(block)], point, StandIn(size))
    model.setup()


def sae_lens_model():
    from sae_lens import HookedSAETransformer

    return HookedSAETransformer(HookedTransformerConfig(**CONFIG)).eval()


def splice_sae_lens(model, name, size):
    from sae_lens import StandardSAE, StandardSAEConfig

    config = StandardSAEConfig(d_in=32, d_sae=size, dtype="float32", device="cpu")
    config.metadata.hook_name = name
    sae = StandardSAE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    model.reset_saes()
    model.add_sae(sae)


@pytest.fixture(params=["stand-in", "sae_lens"])
def kind(request):
    if request.param == "stand-in":
        return stand_in_model(), splice_stand_in
    pytest.importorskip("sae_lens")
    return sae_lens_model(), splice_sae_lens


def plain_run(model, task, names=(), edit=None):
    """The oracle: the log-probability of the continuation and the values at hook points, by TransformerLens alone."""
    seen = {}

    def hook(x, hook):
        seen[hook.name] = x[0]
        return None if edit is None else edit(x)

    with torch.no_grad():
        logits = model.run_with_hooks(task.tokens[None], fwd_hooks=[(name, hook) for name in names])
    log_probs = logits[0, task.prompt_length - 1 : -1].double().log_softmax(-1)
    return log_probs.gather(-1, task.continuation[:, None]).sum(), seen


def test_a_dictionary_at_a_write_is_the_write_that_goes_on(kind):
    (model, splice), task = kind, tiny_task()
    before = ms.collect_writes(model, task)
    splice(model, WRITE, 48)
    after = ms.collect_writes(model, task)
    names = [site.name for site in after.sites]
    assert names[1] == f"{WRITE}.hook_sae_output"
    assert after.source.notes == (f"dictionaries spliced in: {names[1]}",)
    assert not before.source.notes
    _, seen = plain_run(model, task, names)
    torch.testing.assert_close(after.values, torch.stack([seen[name] for name in names]))
    assert (after.values[1] - before.values[1]).abs().max() > 0.01

    edits = [ms.keep(ms.decompose(after), 5), ms.ablate(torch.eye(32)[:, :3])]
    measured = ms.measure(model, task, edits)
    loop = [plain_run(model, task, names, edit)[0] for edit in edits]
    torch.testing.assert_close(measured.log_prob, torch.stack(loop), atol=1e-5, rtol=0)


def test_a_dictionary_in_the_stream_is_refused_for_writes_and_can_be_edited_by_name(kind, silent):
    (model, splice), task = kind, tiny_task()
    ms.collect_writes(model, task)  # the self-check passes, and its answer is kept
    splice(model, STREAM, 48)
    with pytest.raises(
        ValueError,
        match=r"in block 0, resid_pre .* what is on it at blocks.0.hook_resid_post.hook_sae",
    ):
        ms.collect_writes(model, task)
    for point, width in (("output", 32), ("acts_post", 48)):
        at = f"blocks.*.hook_resid_post.hook_sae_{point}"
        name = f"{STREAM}.hook_sae_{point}"
        values = ms.collect_writes(model, task, at=at)
        _, seen = plain_run(model, task, [name])
        torch.testing.assert_close(values.values[0], seen[name])
        edit = ms.keep(ms.decompose(values), 2)
        measured = ms.measure(model, task, [edit, ms.ablate(torch.eye(width)[:, :20])], at=at)
        loop = [
            plain_run(model, task, [name], e)[0]
            for e in (edit, ms.ablate(torch.eye(width)[:, :20]))
        ]
        torch.testing.assert_close(measured.log_prob, torch.stack(loop), atol=1e-5, rtol=0)


def test_another_dictionary_at_the_same_place_has_its_own_shape(kind):
    (model, splice), task = kind, tiny_task()
    for size in (48, 64):
        splice(model, STREAM, size)
        acts = ms.collect_writes(model, task, at=f"{STREAM}.hook_sae_acts_post")
        assert acts.values.shape[-1] == size
        gains = ms.gate(torch.eye(size), torch.zeros(size))
        silenced = ms.measure(model, task, [gains], at=f"{STREAM}.hook_sae_acts_post")
        assert float(silenced.kept_delta[0]) == 0
    splice(model, WRITE, 48)  # SAELens takes the other one out, and its hook points with it
    assert ms.collect_writes(model, task, at=f"{WRITE}.hook_sae_input").values.shape[-1] == 32
