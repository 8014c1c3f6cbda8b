"""Any hook points of a model: collected, edited and measured as writes are, by one engine."""

import pytest
import torch

import mechsvd as ms
from tests.conftest import ACCEPTED, tiny

pytestmark = pytest.mark.filterwarnings("ignore")
PLACES = [
    ("blocks.*.hook_resid_post", None),
    ("blocks.1.hook_resid_pre", None),
    ("blocks.1.attn.hook_z", [0, 2]),
    ("blocks.*.mlp.hook_post", None),
    ("ln_final.hook_normalized", None),
]


def cached(model, tokens, name):
    """What TransformerLens's own cache holds at a hook point."""
    with torch.no_grad():
        return model.run_with_cache(tokens[None], names_filter=[name])[1][name][0]


@pytest.mark.parametrize(("at", "heads"), PLACES)
def test_what_is_collected_is_what_the_cache_holds(real, at, heads):
    found = ms.collect_writes(real.model, real.task, at=at, heads=heads)
    assert all(site.hook_name in real.model.hook_dict for site in found.sites)
    for site, values in zip(found.sites, found.values, strict=True):
        expected = cached(real.model, real.task.tokens, site.hook_name)
        expected = expected if site.head is None else expected[:, site.head]
        torch.testing.assert_close(values, expected)
    assert found.source.hooks == tuple(site.name for site in found.sites)
    assert f"values at {at}, which are no writes" in found.source.notes
    assert "not writes" in repr(found)


@pytest.mark.parametrize(("at", "heads"), PLACES)
def test_a_sweep_there_is_a_loop_of_plain_hooks(real, at, heads):
    svd = ms.decompose(ms.collect_writes(real.model, real.task, at=at, heads=heads))
    ranks = [0, 1, svd.rank // 2, svd.rank]
    sweep = ms.sweep_rank(real.model, real.task, svd, ranks, at=at, heads=heads)
    names = {site.hook_name for site in sweep.measurement.sites}
    for rank, found in zip(ranks, sweep.measurement.log_prob.tolist(), strict=True):
        kept = svd.directions[:, :rank]

        def edit(x, hook, p=kept @ kept.T):
            if heads is None:
                return x @ p
            x = x.clone()
            x[:, :, heads] = x[:, :, heads] @ p
            return x

        with torch.no_grad():
            logits = real.model.run_with_hooks(
                real.task.tokens[None], fwd_hooks=[(name, edit) for name in names]
            )
        log_probs = logits[0, real.task.scored].double().log_softmax(-1)
        expected = log_probs.gather(1, real.task.continuation[:, None]).sum()
        assert found == pytest.approx(float(expected), abs=2e-3)


def test_directions_of_a_place_serve_every_call(real):
    at = {"at": "blocks.*.hook_resid_post", "layers": [1, 2]}
    writes = ms.collect_writes(real.model, real.task, **at)
    assert [site.layer for site in writes.sites] == [1, 2]
    svd, bases = ms.decompose(writes), ms.decompose(writes, per="site")
    mean = ms.mean_baseline(writes)
    ranking = ms.rank_directions(real.model, real.task, bases, baseline=mean, **at)
    assert ranking.bases == ("layer 1 hook_resid_post", "layer 2 hook_resid_post")
    row = ms.measure(real.model, real.task, ms.ablate(svd, 1, baseline=mean), **at)
    hooks = ms.fwd_hooks(real.model, ms.ablate(svd, 1, baseline=mean), **at)
    with torch.no_grad():
        logits = real.model.run_with_hooks(real.task.tokens[None], fwd_hooks=hooks)
    log_probs = logits[0, real.task.scored].log_softmax(-1)
    expected = log_probs.gather(1, real.task.continuation[:, None]).sum()
    assert float(row.log_prob) == pytest.approx(float(expected), abs=1e-3)
    text = ms.generate(real.model, real.prompt, ms.keep(bases, 5), max_new_tokens=4, **at)
    assert text.startswith(real.prompt)
    assert ms.critical_rank(real.model, real.task, svd, 1.0, **at).rank is not None


def test_heads_are_sites_of_their_own(real):
    at = {"at": "blocks.*.attn.hook_z", "layers": [0, 1]}
    writes = ms.collect_writes(real.model, real.task, **at)
    heads = real.model.cfg.n_heads
    assert len(writes.sites) == len({site.name for site in writes.sites}) == 2 * heads
    one = ms.decompose(writes, per="site")[heads + 1]
    expected = cached(real.model, real.task.tokens, "blocks.1.attn.hook_z")[:, 1].double()
    sizes = torch.linalg.svdvals(expected)[: one.rank]
    torch.testing.assert_close(one.singular_values.double(), sizes, rtol=1e-4, atol=1e-5)
    assert one.source.hooks == ("blocks.1.attn.hook_z[1]",)
    removed = ms.measure(
        real.model, real.task, ms.keep(torch.eye(one.d_model)[:, :0]), heads=[1], **at
    )

    def zero(x, hook):
        x = x.clone()
        x[:, :, 1] = 0
        return x

    names = [f"blocks.{layer}.attn.hook_z" for layer in (0, 1)]
    with torch.no_grad():
        logits = real.model.run_with_hooks(
            real.task.tokens[None], fwd_hooks=[(name, zero) for name in names]
        )
    log_probs = logits[0, real.task.scored].log_softmax(-1)
    expected = log_probs.gather(1, real.task.continuation[:, None]).sum()
    assert float(removed.log_prob) == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_the_residual_stream_of_every_architecture_can_be_edited(architecture):
    model = tiny(architecture)
    task = ms.Task(tokens=torch.randint(5, 250, (7,)), prompt_length=3)
    at = {"at": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]}
    writes = ms.collect_writes(model, task, **at)
    assert len(writes.sites) in (1, 2)  # two names of one point, or two points
    kept = ms.measure(model, task, [ms.keep(torch.eye(32)), ms.keep(torch.eye(32)[:, :9])], **at)
    assert float(kept.effect[0].abs()) < 1e-3 < float(kept.absolute_change[1])


def test_what_one_call_saw_is_not_taken_for_another_hook(embedded):
    """The shapes are kept per model; other points are looked at when they are asked for."""
    task = ms.Task(tokens=torch.tensor([0, 5, 9]), prompt_length=1)
    for at, width in (("blocks.0.hook_resid_post", 128), ("blocks.0.mlp.hook_post", 352)):
        assert ms.collect_writes(embedded, task, at=at).values.shape[-1] == width
    assert ms.collect_writes(embedded, task).values.shape[-1] == 128
