"""Metrics, baselines and bases per site once more: raw modules, float64, plain loops, one run an edit."""

import functools
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.edits.exchange import to_transformer_lens
from mechsvd.model.cache import taking_cache

# prompt, right and wrong tokens, words for a logit difference, and the prompts of other texts
WORDS = {
    "embedded": (
        "I believe the meaning of life is",
        " to",
        " the",
        ([" to", " joy"], [" the", " all", " no"]),
        (
            "Simply put, the theory of relativity states that",
            "A brief message congratulating the team on the launch",
            "Let the truth be told to everyone in the room",
            "Please tell my friends that I have learned a new thing",
        ),
    ),
    "stories260k": (
        "Once upon a time, there was",
        " a",
        " the",
        ([" a", " happy"], [" the", " big", " of"]),
        (
            "Lily wanted to play with her friend in the park",
            "Tim saw a big dog and he was very happy",
            "One day, they had a big play with mom",
            "She said that she wanted to be with you all the time",
        ),
    ),
}


def close(found, expected, atol=3e-4, rtol=0.0):
    """Whether what the library gives is what the loop gives."""
    found, expected = (
        (x.detach() if isinstance(x, torch.Tensor) else torch.tensor(np.array(x))).double()
        for x in (found, expected)
    )
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


class Loop:
    """A Llama in float64, its writes seen and replaced at the output projections; sites count in writing order."""

    def __init__(self, directory):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager"
        ).requires_grad_(False)
        self.modules = [
            module
            for layer in self.model.model.layers
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]
        self.sites = range(len(self.modules))
        self.clean = functools.cache(self._clean)

    def logits(self, tokens, edit, attempted=None, kept=None):
        """Logits [pos, d_vocab] where `edit(write, site)` replaces each write [pos, d_model]."""

        def hook_of(site):
            def hook(module, inputs, output):
                edited = edit(output[0], site)
                if attempted is not None:
                    attempted.append(output[0])
                    kept.append(edited)
                return edited[None]

            return hook

        handles = [m.register_forward_hook(hook_of(site)) for site, m in enumerate(self.modules)]
        try:
            return self.model(tokens[None], use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(self, tokens, edit):
        """Logits, attempted writes and kept writes."""
        attempted, kept = [], []
        logits = self.logits(tokens, edit, attempted, kept)
        return logits, torch.stack(attempted), torch.stack(kept)

    def _clean(self, tokens):
        return self.run(torch.tensor(tokens), unchanged)

    def writes(self, task):
        """The clean writes, [site, pos, d_model]."""
        return self.clean(tuple(task.tokens.tolist()))[1]

    def values(self, task, edit, *names):
        """Metrics of the edit, from one run, by loops over the scored tokens; one, or a list."""
        clean = self.clean(tuple(task.tokens.tolist()))[0]
        logits = self.run(task.tokens, edit)[0]
        values = [float(METRICS[name](logits, clean, task)) for name in names]
        return values[0] if len(names) == 1 else values


def unchanged(x, site):
    return x


def scored(task):
    """Pairs of a position and the token that it predicts."""
    return [(i - 1, int(task.tokens[i])) for i in range(task.prompt_length, len(task.tokens))]


def log_prob(logits, clean, task):
    return sum(logits[i].log_softmax(-1)[token].item() for i, token in scored(task))


def kl_divergence(logits, clean, task):
    total = 0.0
    for i, _ in scored(task):
        p, q = clean[i].log_softmax(-1), logits[i].log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
    return total / len(scored(task))


def absolute_change(logits, clean, task):
    return sum(
        abs((logits[i].log_softmax(-1)[token] - clean[i].log_softmax(-1)[token]).item())
        for i, token in scored(task)
    )


def cross_entropy(logits, clean, task):
    return -log_prob(logits, clean, task) / len(scored(task))


def greedy_share(logits, clean, task):
    return sum(int(logits[i].argmax()) == token for i, token in scored(task)) / len(scored(task))


def logit_difference(logits, clean, task):
    row = logits[task.prompt_length - 1]
    right, wrong = (sum(row[t] for t in side) / len(side) for side in (task.right, task.wrong))
    return right - wrong


def last_logit(logits, clean, task):
    """The logit of token 300 at the last scored position."""
    return logits[len(task.tokens) - 2, 300]


def doubt(logits, clean, task):
    """How much less the last token is favoured over token 300 than in the clean run."""
    i, token = scored(task)[-1]
    return (clean[i, token] - clean[i, 300]) - (logits[i, token] - logits[i, 300])


METRICS = {
    function.__name__: function
    for function in (
        *(log_prob, kl_divergence, absolute_change, cross_entropy, greedy_share),
        *(logit_difference, last_logit, doubt),
    )
}
LESS_IS_BETTER = {"kl_divergence", "absolute_change", "cross_entropy"}


def last_logit_of_user(logits, clean, task):
    return logits[:, -1, 300]


def doubt_of_user(logits, clean, task):
    token = int(task.tokens[-1])
    return (clean[-1, token] - clean[-1, 300]) - (logits[:, -1, token] - logits[:, -1, 300])


READY = {
    "log_prob": ms.log_prob,
    "kl_divergence": ms.kl_divergence,
    "absolute_change": ms.absolute_change,
    "cross_entropy": ms.cross_entropy,
    "greedy_share": ms.greedy_share,
    "last_logit": last_logit_of_user,
    "doubt": doubt_of_user,
}


def matrix(directions, gains, rest):
    """V diag(g) Vᵀ + rest·(I − VVᵀ), for writes as rows."""
    v = directions.double()
    gains = torch.as_tensor(gains, dtype=torch.float64)
    return v @ torch.diag(gains) @ v.T + rest * (torch.eye(len(v)).double() - v @ v.T)


def projection(directions, k):
    """The edit x → VₖVₖᵀx at every site."""
    p = matrix(directions[:, :k], [1] * k, 0)
    return lambda x, site: x @ p


def removal(v, points=None):
    """The edit x → x − vvᵀ(x − m) at every site."""
    v = v.double()

    def edit(x, site):
        point = 0 if points is None else points[site][: len(x)]
        return x - torch.outer((x - point) @ v, v)

    return edit


def about(points, m):
    """The edit x → p + (x − p)M at each site, for points p that broadcast to [site, pos, d_model]."""
    return lambda x, site: points[site][: len(x)] + (x - points[site][: len(x)]) @ m


def first(svd, count):
    return replace(
        svd,
        singular_values=svd.singular_values[:count],
        directions=svd.directions[:, :count],
        left=svd.left[..., :count],
    )


def cut(task, length, count=4):
    return ms.Task(task.tokens[:length], length - count, task.pieces[:length])


def rms(writes):
    """Root mean square over positions of the norm of each site's writes."""
    return writes.square().sum(-1).mean(-1).sqrt()


@pytest.fixture(scope="module")
def loop(real):
    return Loop(real.directory)


@pytest.fixture(scope="module")
def choice(real):
    prompt, right, wrong, *_ = WORDS[real.name]
    return ms.Task.from_choice(real.model, prompt, right, wrong)


@pytest.fixture(scope="module")
def few(real):
    """A decomposition with twelve directions, that leaves a rest."""
    return first(real.svd, 12)


@pytest.fixture(scope="module")
def texts(real):
    """Five other texts: three of 13 tokens, two of 10."""
    prompts = WORDS[real.name][4]
    tasks = [ms.Task.from_text(real.model, p, max_new_tokens=8) for p in (*prompts, real.prompt)]
    return [cut(task, n) for task, n in zip(tasks, (13, 10, 13, 10, 13), strict=True)]


@pytest.fixture(scope="module")
def text_writes(real, texts):
    return ms.collect_writes(real.model, texts)


@pytest.fixture(scope="module")
def bases(real):
    """One decomposition per site of the text, and one per layer; they see only a part of the space."""
    writes = ms.collect_writes(real.model, real.task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {per: ms.decompose(writes, per=per) for per in ("site", "layer")}


def sites_of(per, number):
    """The sites, in writing order, of a basis."""
    return [number] if per == "site" else [2 * number, 2 * number + 1]


def by_site(per, matrices):
    """A matrix for each site, from one per basis."""
    return {s: m for number, m in enumerate(matrices) for s in sites_of(per, number)}


def own_directions(loop, task, per):
    """Right singular vectors of each site's (or layer's) own float64 writes, and the singular values."""
    writes = loop.writes(task)
    width = 1 if per == "site" else 2
    groups = writes.reshape(-1, width * writes.shape[1], writes.shape[2])
    _, values, rows = torch.linalg.svd(groups, full_matrices=False)
    return rows.mT, values


# Metrics


@pytest.mark.parametrize(("count", "names"), [(12, [*READY]), (None, ["kl_divergence", "doubt"])])
def test_a_sweep_over_ranks_gives_every_metric_of_the_loop(real, loop, count, names):
    svd, task = real.svd if count is None else first(real.svd, count), real.task
    ranks = [0, 1, 7, svd.rank]
    expected = torch.tensor(
        [loop.values(task, projection(svd.directions, k), *names) for k in ranks]
    )
    clean = torch.tensor(loop.values(task, unchanged, *names))
    for column, name in enumerate(names):
        sweep = ms.sweep_rank(real.model, task, svd, ranks, metric=READY[name])
        found, sign = sweep.measurement, -1 if name in LESS_IS_BETTER else 1
        close(found.value, expected[:, column])
        close(found.clean_run.value, clean[column, None])
        close(found.effect, sign * (clean[column] - expected[:, column]))
        close(sweep.to_pandas()[found.metric], expected[:, column])


def test_divergences_are_those_of_each_scored_position(real, loop):
    ranks = [1, 20, real.svd.rank // 2]
    found = ms.sweep_rank(real.model, real.task, real.svd, ranks).measurement
    clean = loop.clean(tuple(real.task.tokens.tolist()))[0]
    for row, k in enumerate(ranks):
        edited = loop.run(real.task.tokens, projection(real.svd.directions, k))[0]
        for column, (i, _) in enumerate(scored(real.task)):
            terms = clean[i].softmax(-1) * (clean[i].log_softmax(-1) - edited[i].log_softmax(-1))
            close(found.kl_divergences[row, column], terms.sum())


def test_a_choice_is_swept_and_ranked_by_its_logit_difference(real, loop, choice, few):
    ranks, name = [0, 1, 5, 12], "logit_difference"
    sweep = ms.sweep_rank(real.model, choice, few, ranks, metric=ms.logit_difference())
    expected = [loop.values(choice, projection(few.directions, k), name) for k in ranks]
    clean = loop.values(choice, unchanged, name)
    close(sweep.measurement.value, expected)
    close(sweep.to_pandas()[name], expected)
    close(sweep.measurement.clean_run.value, [clean])

    ranking = ms.rank_directions(real.model, choice, few, metric=ms.logit_difference())
    expected = torch.tensor([loop.values(choice, removal(v), name) for v in few.directions.T])
    table = ranking.to_pandas()
    close(table[name], expected)
    close(table["effect"], clean - expected)


def test_a_logit_difference_of_several_tokens_is_that_of_their_means(real, loop, few):
    """It is read where the answer begins, also in a long continuation."""
    right, wrong = WORDS[real.name][3]
    ids = [
        [int(ms.Task.from_choice(real.model, real.prompt, t, "!").tokens[-1]) for t in side]
        for side in (right, wrong)
    ]
    task = replace(real.task, right=tuple(ids[0]), wrong=tuple(ids[1]))
    expected = [
        loop.values(task, projection(few.directions, k), "logit_difference") for k in (2, 12)
    ]
    for measured, metric in (
        (real.task, ms.logit_difference(right, wrong)),
        (real.task, ms.logit_difference(*ids)),
        (task, ms.logit_difference()),
    ):
        sweep = ms.sweep_rank(real.model, measured, few, [2, 12], metric=metric)
        close(sweep.measurement.value, expected)


@pytest.mark.parametrize("name", ["logit_difference", "kl_divergence", "last_logit"])
def test_an_attribution_of_a_metric_has_the_hessian_of_the_float64_module(
    real, loop, choice, few, name, silent
):
    metric = ms.logit_difference() if name == "logit_difference" else READY[name]
    task = choice if name == "logit_difference" else real.task
    found = ms.hessian_attribution(
        real.model, task, few, metric=metric, pairs=5, bases={"directions": torch.eye(13)}
    )
    clean = loop.clean(tuple(task.tokens.tolist()))[0]
    v = few.directions.double()

    def f(w):
        def edit(x, site):
            inside = x @ v
            return (inside * w[:12]) @ v.T + w[12] * (x - inside @ v.T)

        return METRICS[name](loop.logits(task.tokens, edit), clean, task)

    w = torch.ones(13, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(f, w)
    gradient = torch.autograd.functional.jacobian(f, w)
    values = torch.linalg.eigvalsh(hessian)
    values = values[values.abs().argsort(descending=True)]
    size = float(values[0].abs())
    assert found.objective == ("last_logit_of_user" if name == "last_logit" else name)
    close(found.eigenvalues, values[:5], atol=1e-3 * size)
    with torch.no_grad():
        close(found.value, f(w))
        close(found.baseline, f(0 * w))
        for basis in (found, found.bases["directions"]):
            vectors = basis.vectors.double()
            curved = (vectors * (hessian @ vectors)).sum(0)
            measured = torch.stack([f(w) - f(w - u * (u @ w)) for u in vectors.T])
            linear = (vectors.T @ w) * (vectors.T @ gradient)
            close(basis.measured, measured)
            close(basis.slopes, vectors.T @ gradient)
            close(basis.linear, linear)
            close(basis.eigenvalues, curved, atol=1e-3 * size)
            close(basis.quadratic, linear - curved * (vectors.T @ w) ** 2 / 2, atol=1e-3 * size)
    vectors = found.vectors.double()
    assert (hessian @ vectors - vectors * values[:5]).norm(dim=0).max() < 2e-3 * size


def probability_of_user(logits, clean, task):
    log_probs = logits.log_softmax(-1)
    return (
        log_probs.gather(-1, task.continuation.expand(len(logits), -1)[..., None]).sum((1, 2)).exp()
    )


@pytest.mark.parametrize(
    "metric", [ms.kl_divergence, probability_of_user], ids=["divergence", "probability"]
)
def test_an_attribution_says_that_a_slope_is_hidden_only_where_one_is(real, metric):
    """The divergence has none at its minimum; a probability has a small one, in a small unit."""
    few = first(real.svd, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ms.hessian_attribution(real.model, real.task, few, metric=metric, pairs=3)
        if metric is probability_of_user:
            own = ms.hessian_attribution(real.model, real.task, few, pairs=3)
            close(found.eigenvalues / own.eigenvalues, torch.ones(3), atol=1e-3)
            close(found.measured / own.value, own.measured / own.value)
    assert not [str(w.message) for w in caught if "hides the slope" in str(w.message)]


def test_the_path_integral_of_a_logit_difference_is_that_of_the_float64_module(real, loop, choice):
    few = first(real.svd, 5)
    found = ms.hessian_attribution(
        real.model, choice, few, metric=ms.logit_difference(), pairs=2,
        bases={"directions": torch.eye(6)}, path_steps=40,
    ).bases["directions"]  # fmt: skip
    v = few.directions.double()

    def f(w):
        edit = lambda x, site: ((x @ v) * w[:5]) @ v.T + w[5] * (x - x @ v @ v.T)
        return logit_difference(loop.logits(choice.tokens, edit), None, choice)

    nodes, weights = np.polynomial.legendre.leggauss(40)
    w, total = torch.ones(6, dtype=torch.float64), 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        total = total + weight * torch.autograd.functional.jacobian(f, node * w)
    close(found.integrated, total)


# Baselines


def ranked(real, loop, task, svd, baseline, points, metric=ms.log_prob):
    """Compare a ranking about a baseline with x → x − vvᵀ(x − m), one run a direction."""
    svd = first(svd, 5)
    found = ms.rank_directions(real.model, task, svd, baseline=baseline, metric=metric)
    names = (metric.name, "kl_divergence")
    expected = [loop.values(task, removal(v, points), *names) for v in svd.directions.T]
    expected, clean = torch.tensor(expected), loop.values(task, unchanged, metric.name)
    table, sign = found.to_pandas(), -1 if metric.name in LESS_IS_BETTER else 1
    close(table[metric.name], expected[:, 0])
    close(table["effect"], sign * (clean - expected[:, 0]))
    close(table["kl_divergence"], expected[:, 1])


def test_mean_ablation_of_each_direction_equals_the_loop(real, loop, few, texts, text_writes):
    means = torch.cat([loop.writes(task) for task in texts], dim=1).mean(dim=1, keepdim=True)
    baseline = ms.mean_baseline(text_writes)
    close(baseline.values[0], means, atol=1e-4)
    points = means.expand(-1, 64, -1)
    ranked(real, loop, real.task, few, baseline, points)  # a longer, other text
    ranked(real, loop, texts[1], few, baseline, points, ms.cross_entropy)


@pytest.mark.parametrize("chosen", [(0, 2), (0, 1, 2, 3, 4), (1,)])
def test_mean_ablation_by_position_equals_the_loop(real, loop, few, texts, text_writes, chosen):
    """Of texts of one length, of several, and of one text alone, which then loses nothing."""
    chosen = [texts[i] for i in chosen]
    longest = max(len(task.tokens) for task in chosen)
    points = torch.zeros(len(loop.sites), longest, real.d_model).double()
    for site in loop.sites:
        for position in range(longest):
            reach = [task for task in chosen if len(task.tokens) > position]
            points[site, position] = sum(loop.writes(t)[site, position] for t in reach) / len(reach)
    writes = text_writes if len(chosen) == 5 else ms.collect_writes(real.model, chosen)
    baseline = ms.mean_baseline(writes, by="position")
    close(baseline.values[0], points, atol=1e-4)
    for task in chosen[:2]:
        ranked(real, loop, task, few, baseline, points)


def test_resampling_takes_the_writes_of_another_text_of_the_same_length(
    real, loop, few, texts, text_writes
):
    baseline = ms.resample_baseline(text_writes, seed=3)
    donors = {}
    for i, task in enumerate(texts):
        own = baseline.for_task(task).values[0].double()
        fits = [
            j
            for j, other in enumerate(texts)
            if loop.writes(other).shape == own.shape
            and (loop.writes(other) - own).abs().max() < 1e-3
        ]
        assert len(fits) == 1, "the points are the writes of one text"
        donors[i] = fits[0]
    assert sorted(donors.values()) == [0, 1, 2, 3, 4]
    assert all(i != donor for i, donor in donors.items())
    assert all(len(texts[i].tokens) == len(texts[j].tokens) for i, j in donors.items())
    for i in (0, 1):
        ranked(real, loop, texts[i], few, baseline, loop.writes(texts[donors[i]]))


def test_a_donor_of_the_same_length_and_a_longer_one_equal_the_loop(real, loop, few, texts):
    for donor in (texts[2], real.task):
        baseline = ms.donor_baseline(real.model, donor)
        ranked(real, loop, texts[0], few, baseline, loop.writes(donor))
    inner = ms.donor_baseline(real.model, texts[2], layers=[1])
    points = loop.writes(texts[2])
    found = ms.measure(real.model, texts[0], [ms.ablate(few, 4, baseline=inner)], layers=[1])
    edit = about(points, matrix(few.directions[:, :4], [0] * 4, 1))
    only = lambda x, site: edit(x, site) if site in (2, 3) else x
    close(found.log_prob, [loop.values(texts[0], only, "log_prob")])


@pytest.mark.parametrize("positions", [None, [2, 3]])
@pytest.mark.parametrize("kind", ["site", "position", "donor", "resample"])
def test_keeping_and_gating_about_a_baseline_equals_the_loop(
    real, loop, few, texts, text_writes, kind, positions
):
    task, other = texts[0], texts[2]
    baseline = {
        "site": lambda: ms.mean_baseline(text_writes),
        "position": lambda: ms.mean_baseline(text_writes, by="position"),
        "donor": lambda: ms.donor_baseline(real.model, other),
        "resample": lambda: ms.resample_baseline(text_writes, seed=3),
    }[kind]()
    points = baseline.for_task(task).values[0].double().expand(-1, len(task.tokens), -1)
    gains = torch.linspace(-0.5, 1.5, 12)
    edits = [
        ms.keep(real.svd, 10, baseline=baseline),
        ms.gate(few, gains, rest=0.3, baseline=baseline),
        ms.ablate(real.svd, 3, baseline=baseline),
    ]
    matrices = [
        matrix(real.svd.directions[:, :10], [1] * 10, 0),
        matrix(few.directions, gains, 0.3),
        matrix(real.svd.directions[:, :3], [0] * 3, 1),
    ]
    found = ms.measure(real.model, task, edits, positions=positions, metric=ms.kl_divergence)
    edited_positions = positions or [*range(len(task.tokens))]
    mask = torch.zeros(len(task.tokens), 1, dtype=torch.bool)
    mask[edited_positions] = True
    for row, m in enumerate(matrices):
        everywhere = about(points, m)
        edit = lambda x, s, e=everywhere: torch.where(mask, e(x, s), x)
        logits, attempted, kept = loop.run(task.tokens, edit)
        clean = loop.clean(tuple(task.tokens.tolist()))[0]
        close(found.log_prob[row], log_prob(logits, clean, task))
        close(found.value[row], kl_divergence(logits, clean, task))
        close(found.orig_deltas[row], rms(attempted[:, edited_positions]), atol=0, rtol=1e-4)
        close(found.kept_deltas[row], rms(kept[:, edited_positions]), atol=0, rtol=1e-4)
        bound = replace(edits[row], baseline=baseline.for_task(task))  # for hooks, one text's
        hooks = ms.fwd_hooks(real.model, bound, positions=positions)
        with torch.no_grad():
            close(real.model.run_with_hooks(task.tokens[None], fwd_hooks=hooks)[0], logits)


@pytest.mark.parametrize("count", [12, None])
def test_a_sweep_about_a_baseline_equals_the_loop(real, loop, texts, text_writes, count):
    svd = real.svd if count is None else first(real.svd, count)
    means = torch.cat([loop.writes(task) for task in texts], dim=1).mean(dim=1, keepdim=True)
    points = means.expand(-1, 64, -1)
    ranks = [0, 3, svd.rank - 1, svd.rank]
    baseline = ms.mean_baseline(text_writes)
    found = ms.sweep_rank(real.model, real.task, svd, ranks, baseline=baseline)
    for row, k in enumerate(ranks):
        edit = about(points, matrix(svd.directions[:, :k], [1] * k, 0))
        close(found.measurement.log_prob[row], loop.values(real.task, edit, "log_prob"))


# A basis per site or layer


@pytest.mark.parametrize("per", ["site", "layer"])
@pytest.mark.parametrize("scale", [None, "site", "norm"])
def test_a_basis_per_site_is_the_svd_of_its_own_writes(real, loop, per, scale, silent):
    collected = ms.collect_writes(real.model, real.task)
    found = ms.decompose(collected, per=per, scale=scale)
    writes = loop.writes(real.task)
    norms = writes.norm(dim=-1, keepdim=True)
    if scale == "site":
        writes = writes / (norms**2).mean(dim=1, keepdim=True).sqrt()
    elif scale == "norm":
        writes = writes / norms.sqrt()
    width = 1 if per == "site" else 2
    assert len(found) == len(writes) // width
    for number, svd in enumerate(found):
        group = writes[width * number : width * (number + 1)].flatten(0, 1)
        _, values, rows = torch.linalg.svd(group, full_matrices=False)
        close(svd.singular_values, values[: svd.rank], atol=1e-5 * float(values[0]))
        assert (values[svd.rank :] < 1e-5 * values[0]).all()
        for k in (1, 5, svd.rank):
            if k < len(values) and values[k - 1] - values[k] < 1e-3 * values[0]:
                continue  # two directions of one singular value span a plane, but are not unique
            v = svd.directions[:, :k].double()
            close(v @ v.T, rows[:k].T @ rows[:k])
        left = svd.left.flatten(0, 1).double()
        close(left * svd.singular_values @ svd.directions.double().T, group, atol=1e-4)
        assert svd.layer == (number // 2 if per == "site" else number)


@pytest.mark.parametrize("scale", ["site", "norm"])
def test_a_scaled_pool_is_the_svd_of_the_divided_writes(real, loop, scale):
    found = ms.decompose(ms.collect_writes(real.model, real.task), scale=scale)
    rows = []
    for of_site in loop.writes(real.task):
        size = (sum(float(x @ x) for x in of_site) / len(of_site)) ** 0.5
        rows += [x / (size if scale == "site" else float(x.norm()) ** 0.5) for x in of_site]
    _, values, directions = torch.linalg.svd(torch.stack(rows), full_matrices=False)
    close(found.singular_values, values, atol=1e-5 * float(values[0]))
    v = found.directions[:, :3].double()
    close(v @ v.T, directions[:3].T @ directions[:3])


@pytest.mark.parametrize("per", ["site", "layer"])
def test_a_sweep_over_a_basis_per_site_equals_the_loop(real, loop, bases, per, texts):
    """With the loop's own directions, on the text of the bases and on another one."""
    own, values = own_directions(loop, real.task, per)
    most = max(svd.rank for svd in bases[per])
    assert most == min(values.shape[1], real.d_model)
    gap = ((values[:, :-1] - values[:, 1:]) / values[:, :1]).min(dim=0).values
    ranks = [0, *[k for k in range(1, 16) if gap[k - 1] > 1e-3][:3], most]
    assert len(ranks) == 5
    for task in (real.task, texts[0]):
        sweep = ms.sweep_rank(real.model, task, bases[per], ranks, metric=ms.kl_divergence)
        for row, k in enumerate(ranks):
            projectors = by_site(per, [v[:, :k] @ v[:, :k].T for v in own])
            edit = lambda x, site, p=projectors: x @ p[site]
            divergence, log_probability = loop.values(task, edit, "kl_divergence", "log_prob")
            close(sweep.measurement.value[row], divergence)
            close(sweep.measurement.log_prob[row], log_probability)
            kept = rms(loop.run(task.tokens, edit)[2])
            close(sweep.measurement.kept_deltas[row], kept, atol=1e-3, rtol=1e-3)
    if most < real.d_model:  # all own writes lie in the basis, so nothing is clipped
        whole = ms.sweep_rank(real.model, real.task, bases[per], [most]).measurement
        close(whole.log_prob, whole.clean_run.log_prob)


@pytest.mark.parametrize("per", ["site", "layer"])
@pytest.mark.parametrize("by_mean", [False, True])
def test_a_ranking_per_site_removes_a_direction_at_its_own_sites_only(
    real, loop, bases, per, by_mean, text_writes
):
    cut_bases = [first(svd, 1 + number % 3) for number, svd in enumerate(bases[per])]
    baseline = ms.mean_baseline(text_writes) if by_mean else None
    points = torch.zeros(len(loop.sites), real.d_model).double()
    if baseline is not None:
        points = baseline.values[0, :, 0].double()
    ranking = ms.rank_directions(
        real.model, real.task, cut_bases, baseline=baseline, metric=ms.absolute_change
    )
    table, expected = ranking.to_pandas(), []
    for number, svd in enumerate(cut_bases):
        own_sites = sites_of(per, number)
        for v in svd.directions.T.double():

            def edit(x, site, v=v, own_sites=own_sites):
                return x - torch.outer((x - points[site]) @ v, v) if site in own_sites else x

            expected.append(loop.values(real.task, edit, "absolute_change", "log_prob"))
    close(table["effect"], torch.tensor(expected)[:, 0])
    close(table["log_prob"], torch.tensor(expected)[:, 1])
    parts = ["attn", "mlp"]
    names = [
        f"layer {n // 2} {parts[n % 2]}" if per == "site" else f"layer {n}"
        for n, svd in enumerate(cut_bases)
        for _ in range(svd.rank)
    ]
    assert table["basis"].tolist() == names
    assert table["direction"].tolist() == [j for svd in cut_bases for j in range(svd.rank)]


@pytest.mark.parametrize("per", ["site", "layer"])
@pytest.mark.parametrize("by", ["kl_divergence", "effect"])
def test_a_sweep_in_an_order_keeps_the_first_of_each_basis_in_that_order(
    real, loop, bases, per, by
):
    cut_bases = [first(svd, 2 + number % 3) for number, svd in enumerate(bases[per])]
    ranking = ms.rank_directions(real.model, real.task, cut_bases)
    order = ms.order_by_effect(ranking, by)
    damage = ranking.to_pandas()[by].to_numpy()
    assert order.tolist() == sorted(range(len(damage)), key=lambda j: -damage[j])
    ranks = [0, 1, 2, 4]
    sweep = ms.sweep_rank(real.model, real.task, cut_bases, ranks, order)
    starts = np.cumsum([0, *(svd.rank for svd in cut_bases)])
    for row, k in enumerate(ranks):
        matrices = []
        for start, svd in zip(starts[:-1], cut_bases, strict=True):
            within = [int(j - start) for j in order if start <= j < start + svd.rank][:k]
            matrices.append(matrix(svd.directions[:, within], [1] * len(within), 0))
        projectors = by_site(per, matrices)
        edit = lambda x, site, p=projectors: x @ p[site]
        close(sweep.measurement.log_prob[row], loop.values(real.task, edit, "log_prob"))


def test_gates_over_a_basis_per_site_about_a_baseline_equal_the_loop(real, loop, bases, texts):
    task, donor = texts[0], ms.donor_baseline(real.model, texts[2])
    points, svds = loop.writes(texts[2]), bases["site"]
    gains = [torch.linspace(-1, 1, svd.rank) * (-1) ** n for n, svd in enumerate(svds)]
    edits = [
        ms.keep(svds, 6, baseline=donor),
        ms.ablate(svds, 6, baseline=donor),
        ms.gate(svds, gains, 0.3, baseline=donor),
        ms.shrink(svds, 5.0, baseline=donor),
    ]
    shrunk = [svd.singular_values.double() ** 2 for svd in svds]
    matrices = [
        [matrix(svd.directions[:, :6], [1] * 6, 0) for svd in svds],
        [matrix(svd.directions[:, :6], [0] * 6, 1) for svd in svds],
        [matrix(svd.directions, g, 0.3) for svd, g in zip(svds, gains, strict=True)],
        [matrix(svd.directions, q / (q + 5.0), 0) for svd, q in zip(svds, shrunk, strict=True)],
    ]
    found = ms.measure(real.model, task, edits)
    for row, of_site in enumerate(matrices):
        edit = lambda x, s, of_site=of_site: points[s] + (x - points[s]) @ of_site[s]
        close(found.log_prob[row], loop.values(task, edit, "log_prob"))
        logits = real.model.run_with_hooks(
            task.tokens[None], fwd_hooks=ms.fwd_hooks(real.model, edits[row])
        )
        close(logits[0].detach(), loop.run(task.tokens, edit)[0])


# TransformerLens's interchange, and whole runs of a donor


def test_ablating_about_a_donor_is_the_interchange_of_transformer_lens(real, loop, texts):
    interchange = pytest.importorskip(
        "transformer_lens.tools.analysis.interchange",
        reason="this TransformerLens has no SubspaceInterchange",
    )
    base, source = texts[0], texts[4]
    subspace = real.svd.subspace(5)
    theirs = interchange.SubspaceInterchange(to_transformer_lens(subspace).basis)
    ours = ms.ablate(subspace, baseline=ms.donor_baseline(real.model, source))
    for site in (ms.find_sites(real.model)[i] for i in (2, 5)):
        where = {"layers": [site.layer], "components": [site.component]}
        with torch.no_grad():
            base_cache = real.model.run_with_cache(base.tokens[None])[1]
            source_cache = real.model.run_with_cache(source.tokens[None])[1]
            x, other = base_cache[site.hook_name], source_cache[site.hook_name]
            close(ours(x, hook=SimpleNamespace(name=site.name)), theirs(x, other), atol=1e-4)
            mine = real.model.run_with_hooks(
                base.tokens[None], fwd_hooks=ms.fwd_hooks(real.model, ours, **where)
            )
            interchanged = real.model.run_with_hooks(
                base.tokens[None],
                fwd_hooks=[(site.hook_name, lambda x, hook, other=other: theirs(x, other))],
            )
            close(mine, interchanged, atol=2e-4)
            position = 7
            at_one = real.model.run_with_hooks(
                base.tokens[None],
                fwd_hooks=ms.fwd_hooks(real.model, ours, positions=[position], **where),
            )
            tool = interchange.run_with_intervention(
                real.model,
                site.hook_name,
                theirs,
                base.tokens[None],
                other[:, position],
                lambda tokens: real.model(tokens),
                positions=torch.tensor([position]),
            )
            close(at_one, tool, atol=2e-4)
        number = 2 * site.layer + (site.component == "mlp")
        edit = about(loop.writes(source), matrix(subspace.basis, [0] * 5, 1))
        only = lambda x, s, e=edit, number=number: e(x, s) if s == number else x
        close(mine[0], loop.run(base.tokens, only)[0])


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_patching_every_write_from_a_donor_gives_the_logits_of_the_donor(real, loop, rest):
    """Where both texts have the same token; elsewhere the embedding differs."""
    tokens = real.task.tokens.clone()
    tokens[2:5] = torch.tensor([301, 305, 310])
    other = ms.Task(tokens, real.task.prompt_length)
    donor = ms.donor_baseline(real.model, other)
    d = real.d_model
    edit = ms.gate(torch.eye(d), torch.zeros(d), rest=rest, baseline=donor)
    with torch.no_grad():
        patched = real.model.run_with_hooks(
            real.task.tokens[None], fwd_hooks=ms.fwd_hooks(real.model, edit)
        )[0]
        theirs = real.model(tokens[None])[0]
    same = real.task.tokens == tokens
    assert same[real.task.scored].all()
    close(patched[same], theirs[same], atol=1e-4)
    assert ((patched - theirs).abs().amax(-1) > 0.1).tolist() == (~same).tolist()
    clean = loop.run(tokens, unchanged)[0]
    found = ms.measure(real.model, real.task, [edit])
    close(found.log_prob, [log_prob(clean, clean, other)])
    assert (found.log_prob - found.clean_run.log_prob).abs() > 0.01


# Batches


def test_the_rows_of_a_pass_change_nothing(real, few, bases, texts, text_writes):
    model, task, text, some = real.model, real.task, texts[1], first(few, 3)
    mean, by_position = ms.mean_baseline(text_writes), ms.mean_baseline(text_writes, by="position")
    another, each = ms.resample_baseline(text_writes, seed=3), [first(b, 1) for b in bases["layer"]]
    difference = ms.logit_difference([300, 301], [302])
    few_rows = (
        lambda **o: ms.sweep_rank(model, text, few, [3, 9], metric=difference, baseline=mean, **o),
        lambda **o: ms.sweep_rank(
            model, text, some, [1, 2], metric=doubt_of_user, baseline=by_position, **o
        ),
        lambda **o: ms.sweep_rank(model, text, some, [1, 2], baseline=another, **o),
        lambda **o: ms.sweep_rank(model, task, bases["site"], [2, 9, 20], **o),
    )
    many_rows = (
        lambda **o: ms.sweep_rank(model, task, real.svd, range(0, 60, 10), **o),
        lambda **o: ms.rank_directions(model, task, each, metric=ms.kl_divergence, **o),
    )
    for calls, sizes in ((few_rows, (1,)), (many_rows, (1, 5))):
        for call in calls:
            whole, *others = (call(batch_size=size).measurement for size in (None, *sizes))
            for parts in others:
                for field in ("value", "effect", "log_probs", "kl_divergences", "kept_deltas"):
                    close(getattr(parts, field), getattr(whole, field), atol=2e-4)
    for size in (1, 5):
        writes = ms.collect_writes(model, texts, batch_size=size)
        close(writes.values, text_writes.values, atol=1e-4)
    donor = ms.donor_baseline(model, texts[0], batch_size=1)
    close(donor.values[0], text_writes.values[:, : donor.values.shape[2]], atol=1e-4)


# Next to other hooks and tools


def double_and_shift(x, hook):
    return 2 * x + 1


@pytest.fixture(scope="module")
def kept(real):
    """The projection to half of the directions, as hooks and as a matrix."""
    rank = real.d_model // 2
    edit = ms.keep(real.svd, rank)
    return ms.fwd_hooks(real.model, edit), matrix(real.svd.directions[:, :rank], [1] * rank, 0)


def edit_of_both(p, ours_first):
    """What the projection and the user's hook do together; the user's acts at site 3 only."""

    def edit(x, site):
        if site != 3:
            return x @ p
        return 2 * (x @ p) + 1 if ours_first else (2 * x + 1) @ p

    return edit


def users_edit(x, site):
    return 2 * x + 1 if site == 3 else x


@pytest.mark.parametrize("ours_first", [False, True])
def test_hooks_at_one_point_act_in_the_order_of_the_list(real, loop, kept, ours_first):
    hooks, p = kept
    user = [(ms.find_sites(real.model)[3].hook_name, double_and_shift)]
    tokens = real.task.tokens
    with torch.no_grad():
        found = real.model.run_with_hooks(
            tokens[None], fwd_hooks=[*hooks, *user] if ours_first else [*user, *hooks]
        )[0]

    close(found, loop.run(tokens, edit_of_both(p, ours_first))[0])


@pytest.mark.parametrize("ours_outside", [False, True])
def test_hooks_of_an_enclosing_block_act_first(real, loop, kept, ours_outside):
    hooks, p = kept
    user = [(ms.find_sites(real.model)[3].hook_name, double_and_shift)]
    tokens = real.task.tokens
    outer, inner = (hooks, user) if ours_outside else (user, hooks)
    with torch.no_grad(), real.model.hooks(fwd_hooks=outer):
        found = real.model.run_with_hooks(tokens[None], fwd_hooks=inner)[0]
        alone = real.model(tokens[None])[0]

    outer_alone = (lambda x, site: x @ p) if ours_outside else users_edit
    close(found, loop.run(tokens, edit_of_both(p, ours_outside))[0])
    close(alone, loop.run(tokens, outer_alone)[0])
    with torch.no_grad():
        close(real.model(tokens[None])[0], loop.run(tokens, unchanged)[0])


@pytest.mark.fault(23)
def test_measuring_inside_the_users_hooks_keeps_them(real, loop, few):
    point = ms.find_sites(real.model)[3].hook_name
    with real.model.hooks(fwd_hooks=[(point, double_and_shift)]), pytest.warns(match="hooks"):
        found = ms.sweep_rank(real.model, real.task, few, [0, 4, 12])
    clean = loop.values(real.task, users_edit, "log_prob")
    close(found.measurement.clean_run.log_prob, [clean])
    for row, k in enumerate([0, 4, 12]):
        p = matrix(few.directions[:, :k], [1] * k, 0)
        edit = lambda x, site, p=p: users_edit(x, site) @ p
        close(found.measurement.log_prob[row], loop.values(real.task, edit, "log_prob"))


def test_a_cache_holds_the_kept_writes(real, loop, kept):
    hooks, p = kept
    tokens = real.task.tokens
    logits, _, expected = loop.run(tokens, lambda x, site: x @ p)
    with torch.no_grad(), real.model.hooks(fwd_hooks=hooks):
        found, cache = real.model.run_with_cache(tokens[None])
    close(found[0], logits)
    for site, writes in zip(ms.find_sites(real.model), expected, strict=True):
        close(cache[site.hook_name][0], writes)
    stream = loop.model.model.embed_tokens(tokens) + expected.sum(dim=0)
    close(cache[f"blocks.{real.n_layers - 1}.hook_resid_post"][0], stream)


@pytest.mark.parametrize("component", ["mlp", "attn"])
def test_patching_by_transformer_lens_goes_on_while_a_projection_is_active(
    real, loop, kept, texts, component
):
    """The patch comes after the projection, so it brings in the clean write as it is."""
    import pandas as pd
    from transformer_lens import patching

    hooks, p = kept
    corrupted, clean = texts[0].tokens, texts[2].tokens
    places = pd.DataFrame({"layer": [0, 1, real.n_layers - 1], "pos": [12, 6, 12]})
    with torch.no_grad():
        cache = real.model.run_with_cache(clean[None])[1]
        with real.model.hooks(fwd_hooks=hooks):
            found = getattr(patching, f"get_act_patch_{component}_out")(
                real.model,
                corrupted[None],
                cache,
                lambda logits: logits[0, -1, 300],
                index_axis_names=None,
                index_df=places,
            )
    theirs = loop.writes(texts[2])
    for row, (layer, position) in enumerate(places.to_numpy().tolist()):
        patched_site = 2 * layer + (component == "mlp")

        def edit(x, site, patched_site=patched_site, position=position):
            y = x @ p
            if site == patched_site:
                y[position] = theirs[site, position]
            return y

        close(found[row], loop.run(corrupted, edit)[0][-1, 300])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["keep", "positions", "donor"])
def test_text_generated_with_hooks_is_that_of_a_greedy_loop(real, loop, kind, cached):
    prompt, new = real.task.tokens[: real.task.prompt_length], 6
    few, less = real.d_model // 8, real.d_model // 3
    other = ms.Task.from_text(real.model, WORDS[real.name][4][0], max_new_tokens=12)
    positions = [2, 3, len(prompt) - 1, len(prompt) + 1]
    without = matrix(real.svd.directions[:, :few], [0] * few, 1)
    if kind == "keep":
        hooks = ms.fwd_hooks(real.model, ms.keep(real.svd, less))
        edit = projection(real.svd.directions, less)
    elif kind == "positions":
        hooks = ms.fwd_hooks(real.model, ms.ablate(real.svd, few), positions=positions)
        edit = at(positions, without)
    else:
        donor = ms.donor_baseline(real.model, other)
        hooks = ms.fwd_hooks(real.model, ms.ablate(real.svd, few, baseline=donor))
        edit = about(loop.writes(other), without)
    with real.model.hooks(fwd_hooks=hooks), taking_cache(real.model):
        found = real.model.generate(
            prompt[None],
            max_new_tokens=new,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
            return_type="tokens",
            verbose=False,
        )[0]
    expected = prompt
    for _ in range(new):
        token = loop.run(expected, edit)[0][-1].argmax()
        expected = torch.cat([expected, token[None]])
    assert found.tolist() == expected.tolist()
    assert found.tolist() != real.task.tokens[: len(found)].tolist(), "the edit changes the text"


def at(positions, m):
    def edit(x, site):
        y = x.clone()
        for position in positions:
            if position < len(x):
                y[position] = x[position] @ m
        return y

    return edit


@pytest.fixture(scope="module")
def padded(real, texts):
    """Texts of two lengths, padded on the left, with their mask and their first columns."""
    tokens = [task.tokens for task in texts[:4]]
    width = max(len(row) for row in tokens) + 2
    starts = [width - len(row) for row in tokens]
    pad = real.model.tokenizer.pad_token_id
    batch, mask = torch.full((len(tokens), width), pad), torch.zeros(len(tokens), width).long()
    for row, (start, text) in enumerate(zip(starts, tokens, strict=True)):
        batch[row, start:], mask[row, start:] = text, 1
    return batch, mask, starts


@pytest.mark.fault(12)
def test_padded_texts_get_what_each_gets_alone(real, loop, kept, texts, padded):
    batch, mask, starts = padded
    hooks, p = kept
    mean = ms.mean_baseline(ms.collect_writes(real.model, texts))
    about_mean = ms.fwd_hooks(real.model, ms.keep(real.svd, 9, baseline=mean))
    points = mean.values[0].double().expand(-1, 64, -1)
    for own, edit in (
        ([], unchanged),
        (hooks, lambda x, site: x @ p),
        (about_mean, about(points, matrix(real.svd.directions[:, :9], [1] * 9, 0))),
    ):
        with torch.no_grad():
            found = real.model.run_with_hooks(batch, attention_mask=mask, fwd_hooks=own)
        for row, start in enumerate(starts):
            close(found[row, start:], loop.run(texts[row].tokens, edit)[0])


def test_positions_and_points_by_position_count_the_columns_of_a_padded_batch(
    real, loop, texts, padded
):
    """Not the tokens of each text: with padding, they name other tokens of each row."""
    batch, mask, starts = padded
    donor = ms.donor_baseline(real.model, real.task)
    column, m = max(starts) + 4, matrix(real.svd.directions[:, :9], [0] * 9, 1)
    for baseline in (None, donor):
        hooks = ms.fwd_hooks(
            real.model, ms.ablate(real.svd, 9, baseline=baseline), positions=[column]
        )
        with torch.no_grad():
            found = real.model.run_with_hooks(batch, attention_mask=mask, fwd_hooks=hooks)
        for row, start in enumerate(starts):

            def edit(x, site, start=start, baseline=baseline):
                point = 0 if baseline is None else loop.writes(real.task)[site, column]
                y = x.clone()
                y[column - start] = point + (x[column - start] - point) @ m
                return y

            close(found[row, start:], loop.run(texts[row].tokens, edit)[0])


def test_no_hook_is_left_on_the_model(real):
    assert not any(point.fwd_hooks for point in real.model.hook_dict.values())
