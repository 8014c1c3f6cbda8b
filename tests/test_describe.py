"""Cards of directions: tokens, writers and value vectors against independent computations in float64."""

import dataclasses
import itertools
import math

import pytest
import torch
from scipy.stats import spearmanr

import mechsvd as ms
from mechsvd.experiments.token_columns import COLUMNS, PAIRS, token_columns
from mechsvd.linalg.subspace import complete
from mechsvd.model import induction, splits
from mechsvd.model.induction import induction_chance, induction_scores
from mechsvd.model.readout import readout_of
from mechsvd.model.splits import splits_of
from tests.conftest import ACCEPTED, tiny, tiny_hf, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore")
CHOSEN = [0, 2, 5]


@pytest.fixture(scope="module")
def cards(real):
    return ms.describe(real.model, real.svd, CHOSEN, real.task)


@pytest.fixture(scope="module")
def seen(real, reference):
    """Inputs and outputs of the output weights of the float64 model, and its final stream."""
    inputs, outputs, streams = [], [], []
    handles = [
        module.register_forward_hook(
            lambda m, x, y: outputs.append(y[0]) if inputs.append(x[0][0]) is None else None
        )
        for module in reference.outputs
    ]
    handles.append(
        reference.model.model.norm.register_forward_hook(lambda m, x, y: streams.append(x[0][0]))
    )
    with torch.no_grad():
        reference.model(real.task.tokens[None])
    for handle in handles:
        handle.remove()
    return inputs, torch.stack(outputs), streams[0]


def basis(real):
    return real.svd.directions[:, CHOSEN].double()


def centred(logits):
    return logits - logits.mean(dim=-1, keepdim=True)


def test_read_is_the_gain_and_the_unembedding_in_float64(real, reference, cards):
    gain, unembedding = reference.model.model.norm.weight, reference.model.lm_head.weight
    expected = centred((basis(real).T * gain) @ unembedding.T)
    torch.testing.assert_close(cards.tokens.read.double(), expected, atol=1e-4, rtol=1e-4)


def test_local_is_the_mean_derivative_of_the_float64_head(real, reference, seen, cards):
    head = lambda x: reference.model.lm_head(reference.model.model.norm(x))
    for row, direction in enumerate(basis(real).T):
        slopes = [
            torch.func.jvp(head, (x,), (direction,))[1] for x in seen[2][real.task.scored].double()
        ]
        expected = centred(torch.stack(slopes).mean(dim=0))
        # Hugging Face's norm is in float32
        torch.testing.assert_close(
            cards.tokens.local[row].double(), expected.double(), atol=1e-4, rtol=1e-3
        )


def test_measured_is_the_loop_of_float64_runs_over_the_whole_vocabulary(real, reference, cards):
    def predictions(edit):
        handles = [m.register_forward_hook(lambda m, x, y: edit(y)) for m in reference.outputs]
        with torch.no_grad():
            logits = reference.model(real.task.tokens[None]).logits[0]
        for handle in handles:
            handle.remove()
        return logits.double().log_softmax(-1)[real.task.scored]

    clean = predictions(lambda y: y)
    for row, v in enumerate(basis(real).T):
        edited = predictions(lambda y, v=v: y - (y @ v)[..., None] * v)
        expected = (clean - edited).mean(dim=0)
        torch.testing.assert_close(
            cards.tokens.measured[row].double(), expected, atol=2e-3, rtol=1e-3
        )
        # the scored tokens alone give the effect
        own = (clean - edited).gather(1, real.task.continuation[:, None]).sum()
        assert float(cards.effects[0, row]) == pytest.approx(float(own), abs=5e-3)


def test_coefficients_heads_and_neurons_are_those_of_the_float64_model(
    real, reference, seen, cards
):
    inputs, outputs, _ = seen
    expected = torch.einsum("spd,dk->ksp", outputs, basis(real))
    torch.testing.assert_close(cards.writers.coefficients, expected, atol=2e-3, rtol=1e-3)
    table = cards.writers.shares_to_pandas()
    heads = real.model.cfg.n_heads
    for row, direction in enumerate(CHOSEN):
        total = expected[row].square().sum()
        own = table[table.direction == direction]
        for site, module in enumerate(reference.outputs):
            parts = inputs[site] * (basis(real)[:, row] @ module.weight)
            if site % 2 == 0:
                parts = parts.unflatten(-1, (heads, -1)).sum(-1)
            shares = (parts * expected[row, site][:, None]).sum(dim=0) / total
            kind = ("head", "neuron")[site % 2]
            listed = own[
                (own.layer == site // 2)
                & (own.component == ("attn", "mlp")[site % 2])
                & (own.part == kind)
            ]
            assert kind == "neuron" or len(listed) == heads
            for number, share in zip(listed.number, listed.share, strict=True):
                assert share == pytest.approx(float(shares[number]), abs=1e-4)


def test_parts_add_up_to_their_write_and_shares_to_one(cards):
    parts = cards.writers.parts_to_pandas()
    groups = parts.groupby(["direction", "layer", "component", "task", "position"])
    assert len(groups) == 4 * len(CHOSEN)
    sums = groups.agg({"coefficient": "sum", "write": "first"})
    rest = parts[parts.part == "remainder"]
    assert (sums.coefficient - sums.write).abs().max() < 1e-9
    assert (rest.coefficient.abs() <= 1e-4 * rest.write.abs()).all()
    table = cards.writers.shares_to_pandas()
    assert table.groupby("direction").share.sum().tolist() == pytest.approx([1.0] * 3, abs=1e-9)
    assert table[table.part == "remainder"].share.abs().max() < 1e-5
    # the places are the writes with the largest coefficients
    for row, coefficients in enumerate(cards.writers.coefficients):
        largest = coefficients.abs().flatten().topk(4).values
        own = sums.loc[CHOSEN[row]].write.abs().sort_values(ascending=False)
        torch.testing.assert_close(torch.tensor(own.to_numpy()), largest)


def test_a_sign_flip_turns_read_and_local_exactly_and_nothing_else(real, cards):
    turned = dataclasses.replace(real.svd, directions=-real.svd.directions, left=-real.svd.left)
    other = ms.describe(real.model, turned, CHOSEN, real.task)
    assert torch.equal(other.tokens.read, -cards.tokens.read)
    assert torch.equal(other.tokens.local, -cards.tokens.local)
    assert torch.equal(other.writers.coefficients, -cards.writers.coefficients)
    torch.testing.assert_close(other.tokens.measured, cards.tokens.measured, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.tokens.agreement[0], cards.tokens.agreement[0])
    torch.testing.assert_close(other.writers.shares, cards.writers.shares)
    for column in ("read", "local"):
        first, second = (found.tokens.top(1, column) for found in (cards, other))
        assert torch.equal(first, second)


def test_the_agreement_is_spearmans_of_the_direction_as_it_is_written(cards):
    tokens = cards.tokens
    for pair, (first, second) in enumerate(PAIRS):
        for i, j in itertools.product(range(3), repeat=2):
            a, b = tokens.as_written(i, first), tokens.as_written(j, second)
            rho = spearmanr(a.numpy(), b.numpy()).statistic
            assert float(tokens.agreement[pair, i, j]) == pytest.approx(rho, abs=1e-9)
    listed = tokens.agreement_to_pandas()
    first = [{*tokens.as_written(i, "read").topk(10).indices.tolist()} for i in range(3)]
    second = [{*tokens.measured[i].topk(10).indices.tolist()} for i in range(3)]
    assert listed.shared_top[3:6].tolist() == [
        len(a & b) for a, b in zip(first, second, strict=True)
    ]
    assert listed.spearman[4] == pytest.approx(float(tokens.agreement[1, 1, 1]))
    table = tokens.summary()
    own = tokens.agreement[1].numpy()
    means = [own[range(3), order].mean() for order in itertools.permutations(range(3))]
    assert table.spearman[1] == pytest.approx(own.diagonal().mean())
    assert table.p[1] == pytest.approx(sum(m >= own.diagonal().mean() - 1e-12 for m in means) / 6)


def test_unrelated_columns_are_within_the_null_and_equal_ones_are_not():
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(40, 300, generator=generator)
    read = draw()
    columns = {"read": read, "local": read.exp(), "measured": draw()}
    found = token_columns(
        torch.arange(40), columns, torch.ones(40), tuple(map(str, range(300))), 0, None
    )
    assert found.p_values[0].tolist() == pytest.approx([1 / 201] * 40)
    below = (found.p_values[1] <= 0.05).sum()
    assert 0 <= below <= 6  # 2 of 40 by chance; 7 or more happen once in 200 times
    # the bound is that of Spearman's correlation of n independent pairs, 1.96 ÷ √(n − 1)
    assert float(found.bounds[1].mean()) == pytest.approx(1.96 / math.sqrt(299), rel=0.05)
    summary = found.summary()
    assert summary.p[0] < 0.001 < 0.01 < summary.p[1]


def parts_of(hf):
    """The final norm, the unembedding, and the biases of the writes of GPT-2 and GPT-NeoX."""
    if hasattr(hf, "transformer"):
        blocks = [(b.attn.c_proj.bias, b.mlp.c_proj.bias) for b in hf.transformer.h]
        return hf.transformer.ln_f, hf.get_output_embeddings(), sum(blocks, ())
    blocks = [(b.attention.dense.bias, b.mlp.dense_4h_to_h.bias) for b in hf.gpt_neox.layers]
    return hf.gpt_neox.final_layer_norm, hf.get_output_embeddings(), sum(blocks, ())


def planted(architecture, token=77, size=6.0):
    """A tiny model whose last MLP always writes one token's unembedding, by its bias."""
    hf = tiny_hf(architecture)
    norm, head, biases = parts_of(hf)
    with torch.no_grad():
        torch.nn.init.ones_(norm.weight)
        head.weight[token] *= 2.0
        head.weight[token] -= head.weight[token].mean()
        direction = head.weight[token] / head.weight[token].norm()
        biases[-1].add_(size * direction)
    return tiny(architecture, hf), direction.clone()


@pytest.mark.parametrize("architecture", ["GPT-2", "GPT-NeoX"])
def test_a_planted_direction_has_its_token_on_top_in_all_columns(architecture):
    model, direction = planted(architecture)
    tasks = [tiny_task(12, 6), tiny_task(10, 4, seed=1)]
    svd = ms.decompose(ms.collect_writes(model, tasks))
    svd = dataclasses.replace(svd, directions=complete(direction[:, None]))
    found = ms.describe(model, svd, [0, 1], tasks)
    for column in COLUMNS:
        assert int(found.tokens.top(0, column, 1)) == 77, column
    parts = found.writers.parts_to_pandas()
    first = parts[(parts.direction == 0) & (parts.layer == 1) & (parts.component == "mlp")]
    constants = first[first.part == "constant"]
    assert len(constants) > 0
    assert (constants.coefficient > 4).all()


def test_a_direction_planted_into_a_trained_model_is_found_and_no_part_claims_it(real):
    """A hook of the user's writes a token's unembedding: no head or neuron does."""
    readout = readout_of(real.model)
    rows = readout.unembedding * readout.gain[:, None]
    token = int(rows.norm(dim=0).argmax())
    direction = rows[:, token] / rows[:, token].norm()
    size = 3 * float(ms.collect_writes(real.model, real.task).values.norm(dim=-1).max())
    last = ms.find_sites(real.model)[-1].hook_name
    hook = (last, lambda x, hook: x + size * direction)
    with real.model.hooks(fwd_hooks=[hook]):
        options = {"batched_hooks": True}
        svd = ms.decompose(ms.collect_writes(real.model, real.task, **options))
        found = ms.describe(real.model, svd, [0], real.task, **options)
    assert float((svd.directions[:, 0] @ direction).abs()) > 0.95
    for column in COLUMNS:
        assert int(found.tokens.top(0, column, 1)) == token, column
    shares = found.writers.shares_to_pandas()
    assert shares.iloc[0].part == "remainder"
    assert shares.iloc[0].share > 0.9


@pytest.mark.parametrize("architecture", ["GPT-2", "GPT-NeoX"])
def test_layer_norms_and_biases_are_read_as_the_float64_model_has_them(architecture):
    hf = tiny_hf(architecture)
    model, task = tiny(architecture, hf), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    found = ms.describe(model, svd, [0, 3], task)
    norm, head, biases = parts_of(hf.double())
    streams = []
    handle = norm.register_forward_hook(lambda m, x, y: streams.append(x[0][0]))
    with torch.no_grad():
        hf(task.tokens[None])
    handle.remove()
    parts = found.writers.parts_to_pandas()
    for row, direction in enumerate((0, 3)):
        v = svd.directions[:, direction].double()
        expected = centred(((v - v.mean()) * norm.weight) @ head.weight.T)
        torch.testing.assert_close(found.tokens.read[row].double(), expected, atol=1e-4, rtol=1e-4)
        both = lambda x: head(norm(x))
        slopes = [torch.func.jvp(both, (x,), (v,))[1] for x in streams[0][task.scored]]
        expected = centred(torch.stack(slopes).mean(dim=0))
        torch.testing.assert_close(found.tokens.local[row].double(), expected, atol=1e-4, rtol=1e-4)
        constants = parts[(parts.direction == direction) & (parts.part == "constant")]
        for layer, component, value in zip(
            constants.layer, constants.component, constants.coefficient, strict=True
        ):
            bias = biases[2 * layer + (component == "mlp")]
            assert value == pytest.approx(float(bias @ v), abs=1e-4)


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_writes_are_split_where_they_are_sums_and_said_not_to_be_elsewhere(architecture):
    model, task = tiny(architecture), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    found = ms.describe(model, svd, [0, 1], task)
    is_post_norm = architecture in ("Gemma-2", "OLMo-2")
    assert found.writers.is_split.tolist() == [not is_post_norm] * 4
    parts = found.writers.parts_to_pandas()
    if is_post_norm:
        assert {*parts.part} == {"not split"}
        assert parts.coefficient.tolist() == parts.write.tolist()
        assert len(found.values.cosines) == 0
    rest = parts[parts.part == "remainder"]
    assert (rest.coefficient.abs() <= 1e-4 * rest.write.abs()).all()
    assert found.writers.shares_to_pandas().groupby("direction").share.sum().tolist() == (
        pytest.approx([1.0, 1.0], abs=1e-9)
    )
    assert len(found._repr_html_()) > 5000


def test_a_weight_that_is_not_reached_or_is_another_gives_no_split(monkeypatch):
    model = tiny("Llama")
    sites = ms.find_sites(model)
    assert len(splits_of(model, sites)) == 4
    written = splits.written_vectors

    def other(model, pattern):
        return {name: 1.01 * vectors for name, vectors in written(model, pattern).items()}

    def none(model, pattern):
        raise KeyError("no weight")

    monkeypatch.setattr(splits, "written_vectors", other)
    assert splits_of(model, sites) == {}
    monkeypatch.setattr(splits, "written_vectors", none)
    assert splits_of(model, sites) == {}
    svd = ms.decompose(ms.collect_writes(model, tiny_task()))
    found = ms.describe(model, svd, [0], tiny_task())
    assert {*found.writers.share_kinds} == {"not split"}


def test_a_head_that_is_not_the_final_norm_and_the_unembedding_is_refused():
    hf = tiny_hf("GPT-2")
    model, task = tiny("GPT-2", hf), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    handle = hf.lm_head.register_forward_hook(lambda m, x, y: y + y.roll(1, -1))
    with pytest.raises(ValueError, match="`ln_final` and `W_U` give logits that differ"):
        ms.describe(model, dataclasses.replace(svd, source=None), [0], task)
    handle.remove()
    ms.describe(model, svd, [0], task)


def test_several_texts_count_by_their_scored_positions_in_any_batch():
    model = tiny("Llama")
    tasks = [tiny_task(9, 5), tiny_task(14, 4, seed=1), tiny_task(9, 3, seed=2)]
    svd = ms.decompose(ms.collect_writes(model, tasks))
    found = ms.describe(model, svd, [1, 4], tasks)
    names = [site.hook_name for site in ms.find_sites(model)]
    drops = [[], []]
    for task, (row, direction) in itertools.product(tasks, enumerate((1, 4))):
        v = svd.directions[:, direction]
        edit = lambda x, hook, v=v: x - (x @ v)[..., None] * v
        with torch.no_grad():
            clean, edited = (
                model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)[0, task.scored]
                .double()
                .log_softmax(-1)
                for hooks in ([], [(name, edit) for name in names])
            )
        drops[row].append(clean - edited)
    for row in range(2):
        expected = torch.cat(drops[row]).mean(dim=0)
        torch.testing.assert_close(
            found.tokens.measured[row].double(), expected, atol=1e-4, rtol=1e-4
        )
    again = ms.describe(model, svd, [1, 4], tasks, batch_size=1)
    torch.testing.assert_close(again.tokens.measured, found.tokens.measured, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        again.writers.coefficients, found.writers.coefficients, atol=1e-5, rtol=1e-4
    )
    net = [found.writers.net[:, found.writers.task_index == i] for i in range(3)]
    scored = torch.cat([n[:, t.scored] for n, t in zip(net, tasks, strict=True)], dim=1)
    torch.testing.assert_close(found.tokens.coefficients, scored.mean(dim=1))


def test_layers_and_positions_restrict_the_writes_that_are_told_of():
    model, task = tiny("Llama"), tiny_task()
    options = {"layers": [1], "positions": [2, 3, 6]}
    svd = ms.decompose(ms.collect_writes(model, task, **options))
    found = ms.describe(model, svd, [0], task, **options)
    writes = ms.collect_writes(model, task, **options).values
    expected = (writes.double() @ svd.directions[:, 0].double())[None]
    torch.testing.assert_close(found.writers.coefficients, expected, atol=1e-5, rtol=1e-4)
    assert found.writers.positions.tolist() == [2, 3, 6]
    with pytest.raises(ValueError, match="`at` is 'blocks.*.hook_resid_post', but a card"):
        ms.describe(model, svd, [0], task, at="blocks.*.hook_resid_post")


@pytest.mark.fault(1)
def test_writes_that_are_not_finite_are_refused_by_their_place():
    model, task = tiny("Llama"), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))

    def spoil(x, hook):
        x = x.clone()
        x[:, 3] = torch.inf
        return x

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", spoil)]),
        pytest.raises(ValueError, match="inf, first at layer 1 mlp, position 3 of prompt 0"),
    ):
        ms.describe(model, svd, [0], task, batched_hooks=True)


def test_effects_are_those_of_the_ranking_with_its_metric_and_baseline():
    model, tasks = tiny("GPT-2"), [tiny_task(9, 5), tiny_task(11, 6, seed=1)]
    writes = ms.collect_writes(model, tasks)
    svd, baseline = ms.decompose(writes), ms.mean_baseline(writes)
    for options in (
        {"metric": ms.kl_divergence},
        {"metric": ms.logit_difference(5, 7), "baseline": baseline},
        {"metric": lambda logits, clean, task: (logits - clean).abs().mean(dim=(1, 2))},
    ):
        found = ms.describe(model, svd, [1, 3], tasks, **options)
        ranking = ms.rank_directions(model, tasks, svd, **options)
        expected = torch.stack([part.effect[[1, 3]] for part in ranking.parts])
        torch.testing.assert_close(found.effects, expected, atol=1e-5, rtol=1e-4)
        gain = found.dose.gains.tolist().index(0.0)
        torch.testing.assert_close(found.dose.effects[..., gain], expected, atol=1e-5, rtol=1e-4)
        assert found.metric == ranking.parts[0].measurement.metric


@pytest.mark.parametrize(("architecture", "sites"), [("Llama", 4), ("GPT-2", 4), ("Gemma-2", 0)])
def test_half_precision_is_split_to_its_rounding_or_not_at_all(architecture, sites):
    model = tiny(architecture, tiny_hf(architecture).to(torch.bfloat16))
    task = tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    found = ms.describe(model, svd, [0, 1], task)
    assert int(found.writers.is_split.sum()) == sites
    parts = found.writers.parts_to_pandas()
    rest = parts[parts.part == "remainder"]
    assert (rest.coefficient.abs() <= 0.02 * rest.write.abs()).all()
    assert found.tokens.read.dtype == torch.float32


def test_examples_are_the_extremes_of_the_net_coefficient_and_a_sample(cards):
    table = cards.examples_to_pandas()
    for row, direction in enumerate(CHOSEN):
        own, net = table[table.direction == direction], cards.writers.net[row]
        most = own[own.kind == "most"].coefficient.to_numpy()
        least = own[own.kind == "least"].coefficient.to_numpy()
        torch.testing.assert_close(torch.tensor(most), net.topk(3).values)
        torch.testing.assert_close(torch.tensor(least), net.topk(3, largest=False).values)
        sample = own[own.kind == "random"]
        assert len({*sample.position}) == 3
        texts = [cards.writers.pieces[p] for p in sample.position]
        assert sample.token.tolist() == texts


def test_value_vectors_and_their_next_tokens_are_those_of_a_loop(real, reference, seen, cards):
    inputs = seen[0][1::2]
    gain, unembedding = reference.model.model.norm.weight, reference.model.lm_head.weight
    near = cards.values.to_pandas()
    layers = cards.values.layers_to_pandas()
    tokens = real.task.tokens
    for row, direction in enumerate(CHOSEN):
        v = basis(real)[:, row]
        cosines = []
        for layer, module in enumerate(reference.outputs[1::2]):
            values = module.weight.T
            own = (values @ v) / values.norm(dim=1)
            cosines.append(own)
            hits, chances = [], []
            for neuron in own.abs().topk(6).indices.tolist():
                activations = inputs[layer][:-1, neuron]
                where = int(activations.abs().argmax())
                turned = values[neuron] * (-1 if activations[where] < 0 else 1)
                top = int(((turned * gain) @ unembedding.T).argmax())
                hits.append(top == int(tokens[where + 1]))
                chances.append(float((tokens[1:] == top).double().mean()))
            told = layers[(layers.direction == direction) & (layers.layer == layer)]
            assert float(told.agreement.iloc[0]) == pytest.approx(sum(hits) / 6)
            assert float(told.chance.iloc[0]) == pytest.approx(sum(chances) / 6)
        every = torch.stack(cosines)
        expected = every.flatten()[every.abs().flatten().topk(6).indices]
        mine = near[near.direction == direction]
        torch.testing.assert_close(
            torch.tensor(mine.cosine.to_numpy()).double(), expected, atol=1e-5, rtol=1e-4
        )
        for layer, neuron, cosine in zip(mine.layer, mine.neuron, mine.cosine, strict=True):
            assert cosine == pytest.approx(float(every[layer, neuron]), abs=1e-5)


def test_induction_scores_are_those_of_the_cached_patterns(real):
    tokens = induction._repeated(real.model, 24, 4, 0)
    scores = induction_scores(real.model)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(real.n_layers)]
    _, cache = real.model.run_with_cache(tokens, names_filter=names)
    for layer, name in enumerate(names):
        for head in range(real.model.cfg.n_heads):
            seen = [
                float(cache[name][row, head, q, q - 24 + 1])
                for row in range(4)
                for q in range(25, 49)
            ]
            assert float(scores[layer, head]) == pytest.approx(sum(seen) / len(seen), abs=1e-6)
    for row in tokens:
        assert torch.equal(row[1:25], row[25:])
    even = [1 / (q + 1) for q in range(25, 49)]
    assert induction_chance(real.model) == pytest.approx(sum(even) / 24)


def test_a_stopped_call_goes_on_and_a_saved_one_comes_back(tmp_path, cards, real):
    kept = ms.describe(real.model, real.svd, CHOSEN, real.task, checkpoint=tmp_path / "cards.run")
    again = ms.describe(real.model, real.svd, CHOSEN, real.task, checkpoint=tmp_path / "cards.run")
    assert torch.equal(kept.tokens.measured, again.tokens.measured)
    assert torch.equal(kept.tokens.measured, cards.tokens.measured)
    cards.save(tmp_path / "cards.safetensors")
    loaded = ms.DirectionCards.load(tmp_path / "cards.safetensors")
    assert loaded.to_html() == cards.to_html()
    assert loaded.to_pandas().equals(cards.to_pandas())
    for found in (cards, cards.tokens, cards.writers, cards.values):
        assert len(repr(found).splitlines()) == 3
