import math
from dataclasses import replace
from functools import cache

import pytest
import torch

import mechsvd as ms
from mechsvd.experiments.search import LEAST, PROBES, _evenly, _next_ranks
from tests.conftest import tiny as bridge
from tests.conftest import tiny_hf


@pytest.fixture(scope="module")
def found(embedded, meaning, meaning_svd):
    return ms.critical_rank(embedded, meaning, meaning_svd)


def sweep_of(curve, ranks, clean=0.0):
    """A sweep of made-up log-probabilities."""
    log_probs, ones = (
        torch.tensor([[curve(rank)] for rank in ranks]).double(),
        torch.ones(len(ranks), 1),
    )
    said, sites = log_probs >= clean, (ms.Site(0, "mlp", "blocks.0.hook_mlp_out"),)
    first = ms.Measurement(
        torch.full((1, 1), clean).double(), torch.ones(1, 1) > 0, ones[:1], ones[:1], sites
    )
    measured = ms.Measurement(log_probs, said, ones, ones, sites, clean=first)
    return ms.RankSweep(torch.tensor(ranks), torch.arange(512), measured)


def test_the_critical_rank_of_a_real_model_agrees_with_raw_modules_in_float64(real, reference):
    svd, ranks = real.svd, range(real.d_model + 1)
    clean, _, _ = reference.run(lambda x: x)

    @cache
    def log_prob(rank):
        kept = svd.directions[:, :rank].double()
        return reference.run(lambda x, p=kept @ kept.T: x @ p)[0]

    certain = ms.critical_rank(real.model, real.task, svd, 1.0, exhaustive=True)
    for tolerance in (0.0, 0.1, 1.0, 10.0):
        expected = next(rank for rank in ranks if log_prob(rank) >= clean - tolerance - 1e-5)
        searched = ms.critical_rank(real.model, real.task, svd, tolerance)
        assert searched.rank == expected
        tried = searched.to_pandas()
        assert tried["log_prob"].tolist() == pytest.approx(
            [log_prob(rank) for rank in tried["rank"]], abs=1e-3
        )
        if tolerance == 1.0:
            assert certain.rank == expected


def test_a_model_that_uses_exactly_k_directions_has_critical_rank_k(silent):
    """Token i writes along one direction of its own, which alone tells token i + 1; three other tokens write for nothing."""
    useful, useless = 9, 3
    hf_model = tiny_hf("Llama")
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.zero_()
        for module in hf_model.modules():
            if "Norm" in type(module).__name__:
                module.weight.fill_(1.0)
        mlp = hf_model.model.layers[0].mlp
        hf_model.model.embed_tokens.weight[:, 30] = (
            1.0  # all other tokens write along a direction of no use here
        )
        hf_model.model.embed_tokens.weight[[0, *range(10, 11 + useful + useless)], 30] = 0.0
        mlp.gate_proj.weight[30, 30] = mlp.up_proj.weight[30, 30] = mlp.down_proj.weight[
            30, 30
        ] = hf_model.lm_head.weight[1, 30] = 1.0
        hf_model.model.embed_tokens.weight[0, 31] = 1.0  # BOS writes nothing
        for i in range(useful + useless):
            hf_model.model.embed_tokens.weight[10 + i, i] = 1.0
            mlp.gate_proj.weight[i, i] = mlp.up_proj.weight[i, i] = 1.0
            mlp.down_proj.weight[12 + i, i] = 0.5 - 0.02 * i if i < useful else 0.01 / i
            hf_model.lm_head.weight[11 + i, 12 + i] = 1.0 if i < useful else 0.0
    model = bridge("Llama", hf_model)
    tokens = torch.tensor(
        [0, *range(10 + useful, 10 + useful + useless), *range(10, 10 + useful + 1)]
    )
    task = ms.Task(tokens=tokens, prompt_length=2 + useless)
    svd = ms.decompose(ms.collect_writes(model, task))
    assert svd.rank == useful + useless
    assert ms.critical_rank(model, task, svd).rank == useful
    assert ms.critical_rank(model, task, svd, exhaustive=True).crossings == ((useful - 1, useful),)
    assert ms.critical_rank(model, task, svd, criterion=ms.same_greedy_text).rank == useful
    assert ms.critical_rank(model, task, svd, order=range(svd.rank - 1, -1, -1)).rank == svd.rank


def test_the_search_agrees_with_trying_every_rank(embedded, meaning, meaning_svd, found):
    certain = ms.critical_rank(embedded, meaning, meaning_svd, exhaustive=True)
    assert found.rank == certain.rank
    assert certain.is_certain
    assert not found.is_certain
    assert certain.evaluations == 129 + 1 + 8  # the clean run, and the noise floor
    assert found.evaluations <= LEAST < certain.evaluations
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd)
    assert ms.critical_rank_of(sweep, noise_floor=certain.noise_floor).rank == certain.rank


@pytest.mark.parametrize("last_failure", range(-1, 512, 7))
def test_a_monotone_curve_is_solved_with_a_tenth_of_the_evaluations(last_failure):
    ranks, spent = _evenly(0, 512, PROBES + 1), 8
    tried = []
    while ranks:
        tried, spent = tried + ranks, spent + len(ranks) + 1
        found = ms.critical_rank_of(sweep_of(lambda rank: float(rank > last_failure) - 1, tried))
        ranks = _next_ranks(
            ms.CriticalRank(found.sweep, found.margins, 0.0, spent, found.criterion)
        )
    assert found.rank == last_failure + 1
    assert spent <= 51
    assert len(set(tried)) == len(tried)


def test_a_smaller_crossing_nearby_is_found(embedded, meaning, meaning_svd, monkeypatch):
    """Bisection alone would end at 100: below it only 93 and 94 give the text."""
    import mechsvd.experiments.search

    def bumpy(model, task, svd, ranks, order, **options):
        return sweep_of(lambda rank: 0.0 if rank in (93, 94) or rank >= 100 else -1.0, ranks)

    monkeypatch.setattr(mechsvd.experiments.search, "sweep_rank", bumpy)
    found = ms.critical_rank(embedded, meaning, meaning_svd)
    assert found.rank == 93
    assert {(92, 93), (94, 95), (99, 100)} <= set(found.crossings)


def test_a_search_at_d_model_512_costs_a_tenth_of_a_sweep(silent):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    hf_model = LlamaForCausalLM(config).eval()
    hf_model.config.architectures = ["LlamaForCausalLM"]
    model = bridge("Llama", hf_model)
    tokens = torch.randint(3, 64, (160,), generator=torch.Generator().manual_seed(0))
    task = ms.Task(tokens=torch.cat([torch.tensor([0]), tokens]), prompt_length=150)
    svd = ms.decompose(ms.collect_writes(model, task))
    assert svd.rank == 512
    found = ms.critical_rank(model, task, svd)
    assert found.evaluations <= 51
    assert found.rank is not None


@pytest.mark.fault(37)
def test_margins_within_the_noise_count_and_are_marked_as_ties():
    found = ms.critical_rank_of(
        sweep_of(lambda rank: (-1.0, -1e-6, 0.5)[rank], [0, 1, 2]), noise_floor=1e-5
    )
    assert found.rank == 1
    assert found.to_pandas()["is_tie"].tolist() == [False, True, False]
    assert found.to_pandas()["reached"].tolist() == [False, True, True]


@pytest.mark.parametrize("length", [3, 20])
def test_all_directions_of_the_whole_space_always_give_the_text(real, length):
    task = ms.Task.from_text(real.model, real.prompt, max_new_tokens=length)
    svd = ms.decompose(ms.collect_writes(real.model, task))
    assert svd.rank == real.d_model
    by_effect = ms.order_by_effect(ms.rank_directions(real.model, task, svd))
    for order in (None, by_effect, by_effect.flip(0)):
        certain = ms.critical_rank(real.model, task, svd, order=order, exhaustive=True)
        assert float(certain.margins[-1]) == 0
        assert certain.rank is not None
        assert ms.critical_rank(real.model, task, svd, order=order).rank is not None


def test_when_no_probe_of_the_grid_reaches_the_bar_the_search_goes_on(
    embedded, meaning, meaning_svd, monkeypatch
):
    import mechsvd.experiments.search

    def rare(model, task, svd, ranks, order, **options):
        return sweep_of(lambda rank: 0.0 if 40 <= rank <= 43 else -abs(rank - 41.5) / 100, ranks)

    monkeypatch.setattr(mechsvd.experiments.search, "sweep_rank", rare)
    assert ms.critical_rank(embedded, meaning, meaning_svd).rank == 40


def test_a_bar_in_another_unit_has_no_noise_floor(embedded, meaning, meaning_svd):
    def half_as_probable(measured):
        return measured.log_prob.exp() - 0.5 * measured.clean_run.log_prob.exp()

    found = ms.critical_rank(
        embedded, meaning, meaning_svd, criterion=half_as_probable, exhaustive=True
    )
    assert found.noise_floor == 0
    assert (
        found.rank
        == ms.critical_rank(embedded, meaning, meaning_svd, math.log(2), exhaustive=True).rank
    )
    assert not ms.critical_rank(
        embedded, meaning, meaning_svd, criterion=ms.same_greedy_text
    ).is_tie.any()


def test_a_bar_that_no_rank_reaches_gives_no_rank(embedded, meaning, silent):
    svd = ms.decompose(ms.collect_writes(embedded, meaning, positions=[0, 1]))  # far too few writes
    found = ms.critical_rank(embedded, meaning, svd)
    assert found.rank is None
    assert "Critical rank not reached of" in repr(found)


def test_the_bars_differ(embedded, meaning, meaning_svd, found):
    assert ms.critical_rank(embedded, meaning, meaning_svd, 5.0).rank < found.rank
    each = ms.critical_rank(
        embedded,
        meaning,
        meaning_svd,
        criterion=ms.drop_at_most(0.5, each_token=True),
        exhaustive=True,
    )
    drops = each.sweep.measurement.clean.log_probs - each.sweep.measurement.log_probs
    assert each.rank == next(
        rank for rank in range(129) if float(drops[rank].max()) <= 0.5 + each.noise_floor
    )
    greedy = ms.critical_rank(
        embedded, meaning, meaning_svd, criterion=ms.same_greedy_text, exhaustive=True
    )
    kept = [
        None,
        ms.keep(meaning_svd.subspace(greedy.rank)),
        ms.keep(meaning_svd.subspace(greedy.rank - 1)),
    ]
    clean, same, other = ms.generate(
        embedded, ms.SHORTFORM_PROMPTS["meaning"], kept, max_new_tokens=12
    )
    assert clean == same != other


def test_bars_that_cannot_be_are_refused(embedded, meaning, meaning_svd):
    with pytest.raises(ValueError, match="`tolerance` and `criterion` are two thresholds"):
        ms.critical_rank(embedded, meaning, meaning_svd, 1.0, criterion=ms.same_greedy_text)
    with pytest.raises(ValueError, match=r"A drop of -1\.0 nats cannot be allowed"):
        ms.critical_rank(embedded, meaning, meaning_svd, -1.0)
    with pytest.raises(
        ValueError,
        match=r"`criterion` must return a float for each edit, .* but gave torch.bool \[1\] for 1",
    ):
        ms.critical_rank(
            embedded, meaning, meaning_svd, criterion=lambda measured: measured.log_prob > -9
        )
    task = ms.Task.from_text(embedded, "I believe the meaning of life is", " soleil")
    with pytest.raises(
        ValueError, match="The clean model itself misses the threshold, same_greedy_text, by 4"
    ):
        ms.critical_rank(embedded, task, meaning_svd, criterion=ms.same_greedy_text)


def test_the_table_the_printed_form_and_saving(found, tmp_path):
    assert list(found.to_pandas().columns) == ["rank", "log_prob", "margin", "reached", "is_tie"]
    assert len(repr(found).splitlines()) == 3
    found.save(tmp_path / "found.safetensors")
    loaded = ms.CriticalRank.load(tmp_path / "found.safetensors")
    assert (loaded.rank, loaded.crossings, loaded.criterion) == (
        found.rank,
        found.crossings,
        "a drop of at most 0 nats",
    )


def test_a_subspace_of_rank_0_is_a_subspace(embedded, meaning, meaning_svd):
    """Keeping nothing is ablating everything; ablating nothing is the clean run: in every call that takes a subspace."""
    nothing, everything = meaning_svd.subspace(0), ms.span(torch.eye(128))
    assert nothing.rank == 0
    assert nothing.d_model == 128
    found = ms.measure(
        embedded, meaning, [ms.keep(nothing), ms.ablate(everything), ms.ablate(nothing)]
    )
    zeros = ms.measure(embedded, meaning, [lambda x, hook: torch.zeros_like(x)])
    assert torch.allclose(found.log_prob[:2], zeros.log_prob, atol=1e-4)
    assert torch.allclose(found.log_prob[2:], found.clean_run.log_prob)
    stack = ms.gate(nothing, torch.zeros(3, 0))
    assert torch.allclose(
        ms.measure(embedded, meaning, stack).log_prob, zeros.log_prob.expand(3), atol=1e-4
    )
    with embedded.hooks(fwd_hooks=ms.fwd_hooks(embedded, ms.keep(nothing))):
        logits = embedded(meaning.tokens[None])
    assert torch.allclose(found[0:1].log_probs, picked(logits, meaning), atol=1e-3)
    text = ms.generate(
        embedded, "I believe", edit=[ms.keep(nothing), ms.ablate(nothing), None], max_new_tokens=3
    )
    assert text[1] == text[2] != text[0]


def picked(logits, task):
    log_probs = logits[0, task.prompt_length - 1 : -1].log_softmax(dim=-1)
    return log_probs.gather(1, task.continuation[:, None]).T


def test_a_subspace_of_rank_0_compares_and_is_saved(meaning_svd, tmp_path):
    nothing, three = meaning_svd.subspace(0), meaning_svd.subspace(3)
    compared = ms.overlap([nothing, three, nothing])
    assert compared.values.flatten().tolist() == pytest.approx([0, 0, 0, 0, 3, 0, 0, 0, 0])
    assert compared.expected[0].tolist() == [0, 0, 0]
    assert compared.ratio[0].isnan().all()
    assert compared.z_score[0].isnan().all()
    assert "nothing, as is that of random subspaces" in repr(compared)
    assert ms.principal_angles(nothing, three).shape == (0,)
    assert ms.pool([nothing, three]).singular_values.tolist() == pytest.approx([1, 1, 1])
    assert "no subspace has a direction" in repr(ms.pool([nothing, nothing]))
    assert ms.random_subspace(4, 0).basis.shape == (4, 0)
    nothing.save(tmp_path / "nothing.safetensors")
    assert ms.Subspace.load(tmp_path / "nothing.safetensors").basis.shape == (128, 0)
    assert "rank 0" in repr(nothing)


def test_the_subspace_of_a_critical_rank(embedded, meaning, meaning_svd):
    """Also where that is 0 or none, and along another order than that of the singular values."""
    found = ms.critical_rank(embedded, meaning, meaning_svd)
    assert torch.equal(found.subspace(meaning_svd).basis, meaning_svd.subspace(found.rank).basis)
    order = ms.order_at_random(meaning_svd, seed=1)
    other = ms.critical_rank(embedded, meaning, meaning_svd, order=order)
    basis = other.subspace(meaning_svd).basis
    assert torch.equal(basis, meaning_svd.directions[:, order[: other.rank]])
    assert 0 < other.rank < meaning_svd.rank
    kept = ms.measure(embedded, meaning, [ms.keep(basis)])
    at = other.sweep.ranks.tolist().index(other.rank)
    expected = float(other.sweep.measurement.log_prob[at])
    assert float(kept.log_prob) == pytest.approx(expected, abs=1e-4)
    allowed = ms.critical_rank(embedded, meaning, meaning_svd, 1e4)
    assert allowed.rank == 0
    assert allowed.subspace(meaning_svd).rank == 0
    missed = ms.critical_rank_of(sweep_of(lambda rank: -1.0, [0, 1, 2]))
    with pytest.raises(ValueError, match="The search was over 512 directions"):
        missed.subspace(meaning_svd)
    few = ms.critical_rank_of(ms.sweep_rank(embedded, meaning, meaning_svd, [0, 1]))
    with pytest.raises(ValueError, match="None of the 2 ranks tried reaches .*`exhaustive=True`"):
        few.subspace(meaning_svd)
    with pytest.raises(ValueError, match="come from different models"):
        found.subspace(replace(meaning_svd, source=replace(meaning_svd.source, weights="0" * 64)))
    with pytest.raises(TypeError, match="decomposition"):
        found.subspace(found)


def test_ranks_without_each_token_are_those_of_tables_without_it(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd)
    found = ms.ranks_without_each_token(sweep)
    log_probs = sweep.measurement.log_probs.double()
    clean = sweep.measurement.clean_run.log_probs.double()
    for token in range(len(meaning.continuation)):
        kept = [i for i in range(len(meaning.continuation)) if i != token]
        reached = log_probs[:, kept].sum(1) >= clean[:, kept].sum() - 1e-9
        assert found["critical"][token] == int(reached.int().argmax())
        lasting = reached.flip(0).int().cumprod(0).flip(0).bool()
        assert found["lasting"][token] == int(lasting.int().argmax())
    by_kl = ms.ranks_without_each_token(sweep, criterion=ms.kl_at_most(0.1))
    assert (by_kl["lasting"] >= by_kl["critical"]).all()
    one = ms.Task(meaning.tokens[: meaning.prompt_length + 1], meaning.prompt_length)
    with pytest.raises(ValueError, match="leaving tokens out needs at least two"):
        ms.ranks_without_each_token(ms.sweep_rank(embedded, one, meaning_svd, [0, 9]))
