"""What is not finite: an error that says where in clean runs, and NaN, never a number, under edits."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

import mechsvd as ms
from mechsvd.engine.metrics import divergences, score, token_drops
from mechsvd.model.finite import require_finite_logits
from mechsvd.model.runs import run_model

from .calls import CALLS, earlier, running, small
from .conftest import tiny, tiny_hf, tiny_task

NAN, INF = math.nan, math.inf


def spoilt(number, position=0):
    """A hook function that writes a number at a position and the following ones."""

    def spoil(x, hook):
        x = x.clone()
        x[:, position:] = number
        return x

    return spoil


def overflowing(x, hook):
    """An edit under which every model overflows."""
    return x * 1e38 * 1e38


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    ("clean", "edited", "expected"),
    [
        ([NAN, NAN], [0.5, 0.5], NAN),
        ([0.5, 0.5], [NAN, NAN], NAN),
        ([NAN, NAN], [NAN, NAN], NAN),
        ([1.0, 0.0], [0.5, NAN], NAN),  # where the clean run has no probability
        ([1.0, 0.0], [0.5, 0.5], math.log(2)),
        ([1.0, 0.0], [1.0, 0.0], 0.0),
        ([0.5, 0.5], [1.0, 0.0], INF),
        ([0.25, 0.75], [0.5, 0.5], 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
    ],
)
def test_divergences_are_those_of_the_closed_form_and_nan_where_either_is(clean, edited, expected):
    clean, edited = torch.tensor([clean]).log(), torch.tensor([[edited]]).log()
    found = divergences(edited, clean)
    assert torch.allclose(found, torch.tensor([[expected]]), equal_nan=True)


@pytest.mark.fault(54)
def test_a_nan_token_is_not_the_most_probable_one_and_drops_are_nan_but_of_masked_tokens_0():
    task = ms.Task(torch.tensor([1, 0]), 1)  # argmax of NaN is 0, the scored token
    for number in (NAN, INF, -INF):
        logits = torch.full((1, 1, 4), number)
        log_probs, is_greedy = score(logits.log_softmax(-1), task)
        assert log_probs.isnan().all()
        assert not is_greedy.any()
    clean = torch.tensor([[0.5, 0.5, 0.0]]).log()
    edited = torch.stack([clean, torch.full_like(clean, NAN)])
    assert torch.equal(token_drops(edited[:1], clean), torch.zeros(1, 3))
    assert token_drops(edited, clean)[1].isnan().all()


def top_token(logits, clean, task):
    return logits.argmax(dim=-1).float().mean(dim=-1)


METRICS = [
    *(ms.log_prob, ms.kl_divergence, ms.absolute_change, ms.cross_entropy, ms.greedy_share),
    *(ms.logit_difference(1, 2), ms.Metric("mine", "", top_token)),
]


@pytest.mark.fault(54)
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_of_logits_that_are_not_finite_is_nan_and_of_the_others_as_it_was(metric):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2, 6, generator=generator)
    logits = torch.stack([clean + 0.1] * 5)
    logits[1, 0, 5] = NAN  # tokens that no metric here reads
    logits[2, 1, 4] = INF
    logits[3, 1] = -INF
    logits[4, 0, 5] = -INF  # a masked token, which is allowed
    task = ms.Task(torch.tensor([3, 1, 2]), 1)
    found = metric(logits, clean, task)
    assert found[1:4].isnan().all()
    assert torch.equal(found[0], metric(logits[:1], clean, task)[0])
    assert found[4] == INF if metric.name == "kl_divergence" else found[4].isfinite()


def test_metrics_of_finite_logits_keep_their_slopes():
    logits = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    task = ms.Task(torch.tensor([3, 1, 2]), 1)
    (slope,) = torch.autograd.grad(ms.log_prob(logits, logits[0].detach(), task).sum(), logits)
    probabilities = logits.detach().softmax(-1)
    target = torch.nn.functional.one_hot(task.continuation, 6)
    assert torch.allclose(slope, target - probabilities)


@pytest.mark.fault(54)
@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_call_refuses_a_clean_run_that_is_not_finite(name, silent):
    assert CALLS.keys() == running()
    model, texts, svd = small()
    earlier()
    hooked = model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", spoilt(NAN, 2))])
    where = "layer 0 attn, position 2" if name != "fold" else "hooks of yours"  # no weight holds it
    with hooked, pytest.raises(ValueError, match=where):
        CALLS[name](model, texts, svd)
    CALLS["measure"](model, texts, svd)  # and nothing of it is left


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    ("point", "number", "position", "where"),
    [
        ("blocks.1.hook_mlp_out", NAN, 3, "layer 1 mlp, position 3"),
        ("blocks.0.hook_resid_pre", INF, 0, "blocks.0.hook_resid_pre, position 0"),
        ("blocks.1.hook_resid_post", -INF, 1, "blocks.1.hook_resid_post, position 1"),
        ("unembed.hook_out", NAN, 6, "in the logits at position 6"),
        ("unembed.hook_out", -INF, 6, "in the logits at position 6"),
    ],
)
def test_the_error_says_where_nan_begins_and_what_is_there(point, number, position, where, silent):
    model, texts, svd = small()
    with (
        model.hooks(fwd_hooks=[(point, spoilt(number, position))]),
        pytest.raises(ValueError, match=where) as raised,
    ):
        ms.sweep_rank(model, texts[0], svd, [0, 9])
    assert raised.match(r"what is on the model at .*hook_\w+ may make them: take it off\.$")


@pytest.mark.fault(54)
def test_after_what_is_scored_nan_in_a_write_is_refused_too(silent):
    model, texts, svd = small()
    last = len(texts[0].tokens) - 1  # no prediction depends on it
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", spoilt(NAN, last))]),
        pytest.raises(ValueError, match=f"layer 1 mlp, position {last} of prompt 0, so the writes"),
    ):
        ms.measure(model, texts[0], ms.keep(svd, 9))


@pytest.mark.fault(54)
def test_of_several_texts_the_one_that_is_not_finite_is_named(silent):
    model, texts, svd = small()
    special = int(texts[1].tokens[4])
    assert all(special not in text.tokens for text in (texts[0], *texts[2:]))
    with torch.no_grad():
        weight = next(p for n, p in model.named_parameters() if "embed" in n)
        saved = weight[special].clone()
        weight[special] = INF
        try:
            with pytest.raises(
                ValueError, match="resid_pre, position 4 of prompt 1, so the logits"
            ):
                ms.measure(model, texts, ms.keep(svd, 9), same_model=False)
        finally:
            weight[special] = saved


def half(dtype, scale):
    """A random Llama in half precision whose second MLP writes scale² times as much."""
    hf_model = tiny_hf("Llama")
    for layer in (hf_model.model.layers[1].mlp.up_proj, hf_model.model.layers[1].mlp.down_proj):
        layer.weight.data *= scale
    return tiny("Llama", hf_model.to(dtype))


@pytest.mark.fault(54)
def test_of_float16_that_overflows_the_error_names_the_dtypes_that_work(silent):
    model, task = half(torch.float16, 1e3), tiny_task()
    advice = r"float16 overflows: load the model with dtype=torch.float32 or torch.bfloat16"
    for call in (
        lambda: ms.measure(model, task, ms.chain(), check=False),
        lambda: ms.collect_writes(model, task, check=False),
        lambda: ms.stream_writes(model, [task], check=False),
        lambda: ms.collect_gradients(model, task, ms.find_sites(model)[:1], check=False),
    ):
        with pytest.raises(ValueError, match=advice) as raised:
            call()
        assert "layer 1 mlp, position 0" in str(raised.value)
    wider = half(torch.bfloat16, 1e3)
    assert ms.measure(wider, task, ms.chain(), check=False).log_probs.isfinite().all()


@pytest.mark.fault(54)
def test_a_weight_that_is_not_finite_is_named(silent):
    hf_model = tiny_hf("Llama")
    hf_model.model.layers[0].mlp.up_proj.weight.data[3, 4] = NAN
    model = tiny("Llama", hf_model)
    with pytest.raises(ValueError, match=r"the weight blocks\.0\.mlp\..* holds them"):
        ms.measure(model, tiny_task(), ms.chain(), check=False)


@pytest.mark.fault(54)
def test_under_an_edit_the_edit_is_named_and_masked_tokens_pass(silent):
    model, texts, _ = small()
    tokens, scored = texts[0].tokens[None], slice(4, 8)
    hooks = ms.fwd_hooks(model, overflowing, layers=[1], positions=[6])
    logits = run_model(model, tokens, hooks, scored)
    with pytest.raises(ValueError, match="run under the edit .*layer 1 attn, position 6") as raised:
        require_finite_logits(model, tokens, logits, scored, hooks)
    assert "make it smaller" in str(raised.value)
    logits = run_model(model, tokens, scored=scored)
    logits[..., 9:] = -INF
    require_finite_logits(model, tokens, logits, scored)
    logits[0, 2] = -INF
    with pytest.raises(ValueError, match="logits at position 6"):
        require_finite_logits(model, tokens, logits, scored)


def masked(x, hook):
    """Logits of a vocabulary padded with tokens that cannot come."""
    return torch.cat([x[..., :250], torch.full_like(x[..., 250:], -INF)], dim=-1)


@pytest.mark.fault(54)
def test_a_masked_vocabulary_is_measured_as_if_it_were_shorter(silent):
    model, _, svd = small()
    task = ms.Task(torch.tensor([0, 5, 9, 40, 7, 80]), 3)
    with model.hooks(fwd_hooks=[("unembed.hook_out", masked)]):
        found = ms.measure(model, task, [ms.keep(svd, 9), ms.chain()])
        with pytest.raises(ValueError, match="for logits without NaN"):
            ms.measure(model, task, ms.keep(svd, 9), metric=lambda x, clean, task: x.sum((1, 2)))
        beyond = ms.Task(torch.tensor([0, 5, 9, 255]), 3)
        with pytest.raises(ValueError, match=r"scored token 255 at position 3 has probability 0"):
            ms.measure(model, beyond, ms.keep(svd, 9))
    hooks = ms.fwd_hooks(model, ms.keep(svd, 9))
    clean, edited = (
        run_model(model, task.tokens[None], own, task.scored)[0, :, :250].log_softmax(-1)
        for own in ((), hooks)
    )
    expected = (clean.exp() * (clean - edited)).sum(dim=-1)
    assert torch.allclose(found.kl_divergences[0], expected, atol=1e-5)
    assert torch.allclose(found.kl_divergences[1], torch.zeros(3), atol=1e-6)
    right = edited.gather(-1, task.continuation[:, None])[:, 0]
    assert torch.allclose(found.log_probs[0], right, atol=1e-5)


def measured_edits():
    """A measurement with an edit that overflows between two that do not, of three texts."""
    model, texts, svd = small()
    edits = [ms.keep(svd, 9), overflowing, ms.chain()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ms.measure(model, texts[:3], edits)
    return found, [str(one.message) for one in caught if "not finite" in str(one.message)]


@pytest.mark.fault(54)
def test_a_table_keeps_nan_of_an_edit_that_overflows_with_one_warning_per_text():
    found, warned = measured_edits()
    assert len(warned) == 3
    for part in found.parts:
        broken = part.to_pandas().loc[1].drop("orig_delta")
        assert broken.drop("kept_delta").isna().all()
        assert part.to_pandas().loc[[0, 2]].notna().all(axis=None)
        assert not part.is_greedy[1].any()
        assert part.greedy_share.isnan().tolist() == [False, True, False]
        assert part.effect.isnan().tolist() == [False, True, False]
        assert part.tokens_to_pandas().query("edit == 1").kl_divergence.isna().all()
    old = replace(found[0], is_greedy=torch.ones_like(found[0].is_greedy))  # as files of before
    assert old.greedy_share.isnan().tolist() == [False, True, False]


def broken_ranking():
    """A ranking of three texts with an effect that is not a number."""
    model, texts, svd = small()
    ranking = ms.rank_directions(model, texts[:3], svd, layers=[0])
    part = ranking[1].measurement
    log_probs, divergences = part.log_probs.clone(), part.kl_divergences.clone()
    log_probs[4], divergences[4] = NAN, NAN
    broken = replace(part, log_probs=log_probs, kl_divergences=divergences)
    one = replace(ranking[1], measurement=broken)
    return replace(ranking, parts=(ranking[0], one, ranking[2]))


@pytest.mark.fault(54)
@pytest.mark.parametrize("by", ["effect", "kl_divergence", "absolute_change"])
def test_nan_effects_have_no_order_no_correlation_and_no_interval(by, silent):
    rankings = broken_ranking()
    one = rankings[1]
    for ranking in (one, rankings):
        with pytest.raises(ValueError, match=r"removing \[4\] is NaN.* but an order needs numbers"):
            ms.order_by_effect(ranking, by)
    with pytest.raises(ValueError, match=r"\[4\] is NaN"):
        ms.order_by_compromise(small()[2], one, by=by)
    assert math.isnan(one.correlation(by))
    assert "1 effects are NaN" in repr(one)
    assert "direction 4" not in repr(one)
    if by == "effect":  # p-values too
        with pytest.raises(ValueError, match="NaN or inf at item 4 of text 1"):
            rankings.summary()
    else:
        table = rankings.summary(by)
        assert table.index[table[["mean", "low", "high"]].isna().all(axis=1)].tolist() == [4]
        assert table.drop(index=4).notna().all(axis=None)
    with pytest.raises(ValueError, match="NaN or inf at item 4"):
        rankings.agreement_of_halves()


@pytest.mark.fault(54)
def test_a_search_over_nan_reaches_nothing_there_and_a_summary_keeps_the_row(silent):
    model, texts, svd = small()
    sweeps = ms.sweep_rank(model, texts[:3], svd, [0, 9, 20, svd.rank])
    measured = sweeps[0].measurement
    columns = {name: getattr(measured, name).clone() for name in ("log_probs", "kl_divergences")}
    for column in columns.values():
        column[1] = NAN
    broken = replace(sweeps[0], measurement=replace(measured, **columns))
    for criterion in (
        *(ms.drop_at_most(1e3), ms.kl_at_most(1e3), ms.change_at_most(1e3)),
        lambda measured: torch.ones(len(measured)),  # passes everything
    ):
        found = ms.critical_rank_of(broken, criterion=criterion)
        assert found.reached.tolist() == [True, False, True, True]
        assert found.lasting_rank == 20
        assert found.crossings == ((0, 9), (9, 20))
    table = replace(sweeps, parts=(broken, *sweeps.parts[1:])).summary()
    assert table["rank"].tolist() == [0, 9, 20, svd.rank]
    assert table.loc[1, ["mean", "low", "high"]].isna().all()
    assert table.loc[[0, 2, 3]].notna().all(axis=None)


def spoil_measure(monkeypatch, module, number=0):
    """Let one edit of every measurement that a module makes come out as NaN."""
    measure = module.measure

    def broken(*arguments, **options):
        found = measure(*arguments, **options)
        parts = [
            replace(
                part,
                log_probs=part.log_probs.index_fill(0, torch.tensor([number]), NAN),
                kl_divergences=part.kl_divergences.index_fill(0, torch.tensor([number]), NAN),
            )
            for part in getattr(found, "parts", (found,))
        ]
        return replace(found, parts=tuple(parts)) if hasattr(found, "parts") else parts[0]

    monkeypatch.setattr(module, "measure", broken)


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    ("module", "name", "use"),
    [
        ("mechsvd.experiments.elimination", "order_by_elimination", "an order"),
        ("mechsvd.experiments.optimal", "optimal_baseline", "a minimum"),
        ("mechsvd.attribution.estimates", "estimate_ranking", "an estimate"),
    ],
)
def test_what_compares_nan_effects_is_refused(module, name, use, monkeypatch, silent):
    import importlib

    spoil_measure(monkeypatch, importlib.import_module(module))
    model, texts, svd = small()
    with pytest.raises(ValueError, match=f"NaN, since the model overflows .* but {use} needs"):
        CALLS[name](model, texts, svd)


@pytest.mark.fault(54)
def test_the_p_value_of_an_interaction_with_nan_is_nan(silent):
    model, texts, svd = small()
    found = CALLS["interactions"](model, texts, svd)
    scores = found.both_scores.clone()
    scores[1, -1, -1] = NAN  # of a random basis, which the other is compared with
    broken = replace(found, both_scores=scores)
    for options in ({}, {"total": True}, {"of": "relative"}):
        table = broken.summary(**options)
        assert table.p_value.isna().tolist() == [False, True, *[False] * (len(texts) - 2)]
        expected = found.summary(**options).drop(index=1)
        assert table.drop(index=1).equals(expected)


@pytest.mark.fault(54)
def test_gains_that_make_the_model_overflow_are_the_worst(monkeypatch, silent):
    from mechsvd.attribution import stress

    slopes = stress._slopes

    def broken(*arguments):
        effects, slope = slopes(*arguments)
        return effects.index_fill(0, torch.tensor([1]), NAN), slope

    monkeypatch.setattr(stress, "_slopes", broken)
    found = CALLS["worst_gains"](*small())
    assert found.effects.isnan().all()


@pytest.mark.fault(54)
def test_where_rounding_makes_the_model_overflow_there_is_no_noise_floor(monkeypatch, silent):
    from mechsvd.engine import passes

    model, texts, svd = small()
    monkeypatch.setattr(passes, "spread_by_rounding", lambda run, dtype: torch.tensor([NAN]))
    with pytest.raises(ValueError, match="rounding noise make the clean run overflow"):
        ms.rank_directions(model, texts[0], svd)


@pytest.mark.fault(54)
def test_tokens_that_are_nan_have_no_order_and_no_p_value(silent):
    cards = CALLS["describe"](*small())
    tokens = cards.tokens if hasattr(cards, "tokens") else cards[0].tokens
    broken = replace(tokens, measured=torch.full_like(tokens.measured, NAN))
    with pytest.raises(ValueError, match="an order needs numbers"):
        broken.top(0, "measured")
    from mechsvd.experiments.token_columns import _paired

    for count in (3, 9):
        found = _paired(torch.full((count, count), NAN), 0)
        assert math.isnan(found["spearman"])
        assert math.isnan(found["p"])
