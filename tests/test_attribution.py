"""Attribution against independent computations: own hooks or raw modules, `torch.func.hessian`, finite differences, float64."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

import mechsvd as ms
from mechsvd.attribution.curvature import DENSE
from mechsvd.attribution.hessian import CONTROLS
from mechsvd.attribution.objective import objective_over
from mechsvd.edits.gates import Gate
from mechsvd.engine.session import open_session
from mechsvd.model.evaluation import evaluation
from tests.conftest import ACCEPTED, tiny, tiny_hf, tiny_task


@pytest.fixture(scope="module")
def exact():
    """A tiny random Llama in float64 throughout, raw and as a bridge."""
    raw, model = in_double(tiny_hf("Llama")), tiny("Llama", in_double(tiny_hf("Llama")))
    raw.config._attn_implementation = "sdpa"  # the eager one has its softmax in float32
    for module in list(model.modules()):
        if hasattr(module, "_masked_softmax"):  # asked for float32 too
            whole = lambda self, scores, dtype=None: super(type(self), self)._masked_softmax(scores)
            subclass_of(module, _masked_softmax=whole)
    return raw, model, tiny_task()


def subclass_of(module, **methods):
    """Another class for one module, since a patched method would be somebody's hook."""
    module.__class__ = type(type(module).__name__, (type(module),), methods)


def in_double(raw):
    """The model in float64, its norms too, which transformers computes in float32 whatever the model's dtype."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in raw.double().modules():
        if type(module).__name__ == "LlamaRMSNorm":
            subclass_of(module, forward=forward)
    return raw


def raw_log_prob(raw, task, edits=None, weights=None):
    """The log-probability from the raw modules, whose attention and MLP outputs are edited one after the other."""
    outputs = [
        module
        for layer in raw.model.layers
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    handles = [
        module.register_forward_hook(lambda _, __, out, edit=edit: edit(out))
        for module, edit in zip(outputs, edits or [], strict=False)
    ]
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits = functional_call(raw, weights or {}, (task.tokens[None],)).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[0, task.scored].log_softmax(-1).gather(-1, task.continuation[:, None]).sum()


def gains_function(raw, task, svd):
    """f of the gains: each write's coordinates times the gains, what no direction holds times the last one."""
    v, rest = svd.directions.double(), svd.d_model - svd.rank

    def log_prob(w):
        gains, outside = (w[: svd.rank], w[svd.rank]) if rest else (w, 0.0)

        def edit(x):
            return (x @ v * gains) @ v.T + outside * (x - x @ v @ v.T)

        return raw_log_prob(raw, task, [edit] * 4)

    return log_prob, torch.ones(svd.rank + bool(rest), dtype=torch.float64)


def write_function(raw, task, place, positions):
    """f of the writes of one module at some positions."""
    seen = []
    with torch.no_grad():
        raw_log_prob(raw, task, [lambda x: seen.append(x[0].clone()) or x] * 4)
    clean = seen[place][positions]

    def log_prob(w):
        edits = [lambda x: x] * 4
        change = w.view_as(clean) - clean
        pick = torch.nn.functional.one_hot(torch.tensor(positions), len(task.tokens)).double()
        edits[place] = lambda x: x + pick.T @ change
        return raw_log_prob(raw, task, edits)

    return log_prob, clean.flatten()


def weight_function(raw, task, name):
    """f of one weight matrix."""
    weight = dict(raw.named_parameters())[name].detach()
    return lambda w: raw_log_prob(
        raw, task, weights={name: w.view_as(weight)}
    ), weight.flatten().clone()


@pytest.fixture(
    scope="module", params=["gains", "gains of few directions", "a shift of the writes", "weights"]
)
def kind(request, exact):
    raw, model, task = exact
    raw.requires_grad_(False)
    if request.param == "a shift of the writes":
        over = ms.find_sites(model, layers=[1], components=["attn"])
        return over, {"positions": [3, 5, 6]}, *write_function(raw, task, 2, [3, 5, 6])
    if request.param == "weights":
        return "blocks.0.ln*.weight", {}, *two_norms(raw, task)
    svd = ms.decompose(ms.collect_writes(model, task))
    few = ms.decompose(ms.collect_writes(model, task).values[:1])
    svd = svd if request.param == "gains" else few
    return svd, {}, *gains_function(raw, task, svd)


def two_norms(raw, task):
    names = [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ]
    point = torch.cat([dict(raw.named_parameters())[name].detach() for name in names])
    return lambda w: raw_log_prob(
        raw, task, weights=dict(zip(names, w.split(32), strict=True))
    ), point


@pytest.mark.filterwarnings("ignore:9 writes for 32")
@pytest.mark.parametrize("objective", ["probability", "log_prob"])
def test_every_column_equals_an_independent_computation(kind, exact, objective):
    over, options, log_prob, point = kind
    f = log_prob if objective == "log_prob" else lambda w: log_prob(w).exp()
    found = ms.hessian_attribution(exact[1], exact[2], over, objective=objective, **options)
    u = found.vectors
    close = {"rtol": 1e-7, "atol": 1e-9 * abs(float(f(point)))}
    expected = hessian(f)(point)
    values = torch.linalg.eigvalsh(expected)
    torch.testing.assert_close(
        found.eigenvalues, values[values.abs().argsort(descending=True)], **close
    )
    torch.testing.assert_close(
        u.T @ expected @ u, found.eigenvalues.diag(), rtol=0, atol=1e-10 * float(values.abs().max())
    )
    gradient = torch.func.grad(f)(point)
    torch.testing.assert_close(found.slopes, gradient @ u, **close)
    torch.testing.assert_close(found.projections, point @ u)
    removed = torch.stack([f(point - each * (each @ point)) for each in u.T])
    torch.testing.assert_close(found.measured, f(point) - removed, **close)
    torch.testing.assert_close(found.linear, (point @ u) * (gradient @ u), **close)
    torch.testing.assert_close(
        found.quadratic, found.linear - values_of(u, expected) * (point @ u) ** 2 / 2, **close
    )
    assert (found.value, found.baseline) == (
        pytest.approx(float(f(point))),
        pytest.approx(float(f(0 * point))),
    )
    torch.testing.assert_close(found.share, found.measured / (f(point) - f(0 * point)).detach())
    assert (found.residuals <= 1e-10 * values.abs().max()).all()
    # over a complete basis
    assert float(found.linear.sum()) == pytest.approx(float(point @ gradient), rel=1e-9)
    missed = float(found.integrated.sum()) - (found.value - found.baseline)
    assert abs(missed) == pytest.approx(
        found.path_error, rel=1e-3, abs=1e-9 * found.value if objective == "probability" else 1e-9
    )
    assert abs(missed) <= 0.02 * abs(found.value - found.baseline)


def values_of(u, matrix):
    return (u * (matrix @ u)).sum(dim=0)


def test_the_path_integral_converges_and_is_that_of_the_gradient(exact, silent):
    raw, model, task = exact
    svd = ms.decompose(ms.collect_writes(model, task))
    found = [ms.hessian_attribution(model, task, svd, path_steps=steps) for steps in (2, 8, 64)]
    assert found[0].path_error > found[1].path_error > found[2].path_error
    assert found[2].path_error < 1e-3 * found[2].value
    log_prob, point = gains_function(raw, task, svd)
    slope = torch.func.grad(lambda w: log_prob(w).exp())
    times = (torch.arange(200) + 0.5) / 200  # the midpoint rule
    path = torch.stack([slope(t * point) for t in times]).mean(dim=0)
    expected = (point @ found[2].vectors) * (path @ found[2].vectors)
    torch.testing.assert_close(found[2].integrated, expected, rtol=1e-3, atol=1e-5 * found[2].value)


def test_a_rough_path_integral_is_said(exact):
    _, model, task = exact
    svd = ms.decompose(ms.collect_writes(model, task))
    with pytest.warns(
        UserWarning,
        match=r"with 2 steps along the path their sum misses f\(w\) − f\(0\) = \S+ − \S+ = \S+ by \S+\. More steps",
    ):
        ms.hessian_attribution(model, task, svd, path_steps=2)


def test_products_equal_finite_differences_of_the_gradient(kind, exact):
    over, options, log_prob, point = kind
    found = ms.hessian_attribution(exact[1], exact[2], over, objective="log_prob", **options)
    step = 1e-5
    for component in (0, len(found) // 2):
        u = found.vectors[:, component]
        slopes = [torch.func.grad(log_prob)(point + sign * step * u) for sign in (1, -1)]
        product = (slopes[0] - slopes[1]) / (2 * step)
        torch.testing.assert_close(
            product,
            found.eigenvalues[component] * u,
            rtol=1e-5,
            atol=1e-6 * float(found.eigenvalues[0].abs()),
        )


def test_the_gate_gradient_equals_finite_differences_of_the_engines_own_measurements(exact):
    _, model, task = exact
    svd = ms.decompose(ms.collect_writes(model, task))
    found = ms.hessian_attribution(
        model, task, svd, objective="log_prob", bases={"singular": torch.eye(svd.rank).double()}
    ).bases["singular"]
    step = 1e-5 * torch.eye(svd.rank, dtype=torch.float64)
    up, down = (
        ms.measure(model, task, Gate(svd.directions, 1 + sign * step, source=svd.source)).log_prob
        for sign in (1, -1)
    )
    torch.testing.assert_close(found.slopes, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)
    ranking = ms.rank_directions(model, task, svd)
    torch.testing.assert_close(
        found.measured, ranking.effect, rtol=0, atol=1e-9
    )  # removing a gain is removing a direction


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_every_accepted_architecture_has_exact_products(architecture, silent):
    model, task = tiny(architecture, tiny_hf(architecture).double()), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    clean = float(ms.measure(model, task, [ms.chain()]).clean_run.log_prob)
    for over in (svd, ms.find_sites(model, layers=[0]), "blocks.1.*"):
        found = ms.hessian_attribution(
            model, task, over, pairs=2, objective="log_prob", path_steps=4
        )
        assert found.value == pytest.approx(clean, rel=1e-9)
        with open_session(model, [task], gradients=True) as session:
            f = objective_over(session, task, over)

        def one(w, f=f):
            return f.log_probs(w[None]).sum()

        with evaluation(model, gradients=True):
            rows = torch.stack([f.point, 0.9 * f.point])  # together, and each alone
            torch.testing.assert_close(
                f.log_probs(rows).sum(dim=1),
                torch.stack([one(row) for row in rows]),
                rtol=1e-6,
                atol=1e-6,
            )
            for u, value, residual in zip(
                found.vectors.T, found.eigenvalues, found.residuals, strict=True
            ):
                if (
                    architecture == "Bloom"
                ):  # its activation is written for plain backward passes alone
                    product = torch.autograd.functional.hvp(one, f.point, u)[1]
                else:
                    product = torch.func.jvp(torch.func.grad(one), (f.point,), (u,))[
                        1
                    ]  # forward mode over one backward pass
                assert float((product - value * u).norm()) == pytest.approx(
                    float(residual), abs=2e-5 * float(value.abs())
                )


def test_lanczos_finds_what_the_whole_hessian_holds(exact):
    _, model, task = exact
    over = "blocks.1.mlp.*"  # 6144 entries
    found = ms.hessian_attribution(model, task, over, pairs=8, tolerance=1e-9)
    weights = {name: tuple(shape) for name, shape in found.parts}
    assert len(found.vectors) == 3 * 64 * 32 > DENSE
    raw = exact[0]
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    point = torch.cat([dict(raw.named_parameters())[name].detach().flatten() for name in names])
    shapes = [dict(raw.named_parameters())[name].shape for name in names]
    assert sorted(weights.values()) == sorted(tuple(shape) for shape in shapes)

    def f(w):
        pieces = zip(names, shapes, w.split(2048), strict=True)
        return raw_log_prob(
            raw, task, weights={name: piece.view(shape) for name, shape, piece in pieces}
        ).exp()

    from scipy.sparse.linalg import LinearOperator, eigsh

    gradient = torch.func.grad(f)

    def product(v):
        return (
            torch.func.jvp(gradient, (point,), (torch.from_numpy(v.copy()).view(-1),))[1]
            .detach()
            .numpy()
        )

    values = eigsh(
        LinearOperator((len(point),) * 2, matvec=product, dtype=float), 8, which="LM", tol=1e-10
    )[0]
    np.testing.assert_allclose(found.eigenvalues.numpy(), sorted(values, key=abs)[::-1], rtol=1e-8)
    assert found.converged.all()


@pytest.fixture(scope="module")
def real_exact(real, reference):
    """A trained model with its weights in float64, raw and as a bridge."""
    return reference.model, ms.load_model(real.directory, device="cpu", dtype=torch.float64)


def real_gains(raw, task, svd):
    v, outputs = svd.directions.double(), 2 * len(raw.model.layers)
    return lambda w: raw_log_prob(raw, task, [lambda x: (x @ v * w) @ v.T] * outputs).exp()


def real_weights(raw, found):
    """The raw model's weights in the order of the parts of w, by shape and content."""
    plain = dict(raw.named_parameters())
    names = {
        "embed": "model.embed_tokens",
        "ln_final": "model.norm",
        "unembed": "lm_head",
    }
    inner = {
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
    }
    inner |= {"mlp.gate": "mlp.gate_proj", "mlp.in": "mlp.up_proj", "mlp.out": "mlp.down_proj"}
    inner |= {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    for layer in range(len(raw.model.layers)):
        names |= {
            f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}"
            for ours, theirs in inner.items()
        }
    chosen = [f"{names[name.removesuffix('.weight')]}.weight" for name, _ in found.parts]
    assert all(
        tuple(plain[name].shape) == shape
        for name, (_, shape) in zip(chosen, found.parts, strict=True)
    )
    return chosen, torch.cat([plain[name].detach().flatten() for name in chosen])


def assert_table(found, f, point, rows, rounding, product=None):
    """All scores of some rows to 1e-3, from values and derivatives of an independent f.

    A score that is small beside what it is a part of (u·∇f beside ‖∇f‖, a difference beside f) has the rounding of that.
    """
    value, gradient = f(point), torch.func.grad(f)(point)
    table = found.to_pandas()
    if product is None:
        product = lambda u: torch.func.jvp(torch.func.grad(f), (point,), (u,))[1]
    for row in rows:
        u = found.vectors[:, row].double()
        held, slope = u @ point, u @ gradient
        curved = u @ product(u)
        expected = {
            "eigenvalue": (curved, abs(curved)),
            "projection": (held, point.norm()),
            "slope": (slope, gradient.norm()),
            "linear": (held * slope, abs(held) * gradient.norm() + point.norm() * abs(slope)),
            "quadratic": (
                held * slope - curved * held**2 / 2,
                abs(held) * gradient.norm() + abs(curved * held) * point.norm(),
            ),
            "measured": (value - f(point - u * held), value),
        }
        for column, (number, whole) in expected.items():
            assert table[column][row] == pytest.approx(
                float(number), rel=1e-3, abs=rounding * float(whole)
            ), (row, column)


def test_gates_of_real_models_agree_with_raw_modules(real_exact, real):
    raw, double = real_exact
    svd, ones = svd_of(double, real.task), torch.ones(real.d_model, dtype=torch.float64)
    f = real_gains(raw, real.task, svd)
    found = ms.hessian_attribution(double, real.task, svd)
    expected = hessian(f)(ones)
    values, vectors = torch.linalg.eigh(expected)
    order = values.abs().argsort(descending=True)
    torch.testing.assert_close(
        found.eigenvalues, values[order], rtol=1e-4, atol=0
    )  # norms and softmax are in single precision
    torch.testing.assert_close((found.vectors * vectors[:, order]).sum(dim=0).abs(), ones)
    rows = range(0, real.d_model, 4)
    assert_table(found, f, ones, rows, rounding=1e-6, product=lambda u: expected @ u)
    # and in single precision, where the residuals say how far an eigenvalue can be off
    same = ms.Decomposition(svd.singular_values.float(), svd.directions.float(), svd.left.float())
    single = ms.hessian_attribution(real.model, real.task, same)
    off = (single.eigenvalues[:, None] - values).abs().min(dim=1).values
    assert (off[single.converged] <= 1e-3 * single.eigenvalues[single.converged].abs()).all()
    assert single.converged.sum() >= 60 / 64 * real.d_model


def svd_of(model, task):
    return ms.decompose(ms.collect_writes(model, task))


def test_all_weights_of_real_models_agree_with_raw_modules(real_exact, real):
    raw, double = real_exact
    task, pairs, tolerance = real.task, 20, 1e-4
    if real.name == "embedded":  # five times as many weights, so fewer pairs and a shorter text;
        task = ms.Task(
            tokens=task.tokens[: task.prompt_length + 4], prompt_length=task.prompt_length
        )
        pairs, tolerance = 2, 1e-3  # single precision rounds their products to some 6e-4
    for model in (double, real.model):
        options = {} if model is double else {"tolerance": tolerance}
        found = ms.hessian_attribution(model, task, "*", pairs=pairs, path_steps=4, **options)
        assert found.converged.all()
        assert len(found.vectors) == raw.num_parameters()
        names, point = real_weights(raw, found)
        shapes = [shape for _, shape in found.parts]

        def f(w, names=names, shapes=shapes):
            sizes = [math.prod(shape) for shape in shapes]
            pieces = zip(names, w.split(sizes), shapes, strict=True)
            return raw_log_prob(
                raw, task, weights={name: piece.view(shape) for name, piece, shape in pieces}
            ).exp()

        assert_table(found, f, point, range(pairs), rounding=1e-6 if model is double else 1e-5)
        if model is double:
            from scipy.sparse.linalg import LinearOperator, eigsh

            graph = point.clone().requires_grad_()
            (slope,) = torch.autograd.grad(f(graph), graph, create_graph=True)

            def product(v, s=slope, w=graph):
                return torch.autograd.grad(
                    s, w, torch.from_numpy(v.reshape(-1).copy()), retain_graph=True
                )[0]

            operator = LinearOperator(
                (len(point),) * 2, matvec=lambda v, p=product: p(v).numpy(), dtype=float
            )
            values = sorted(eigsh(operator, pairs, which="LM", tol=1e-6)[0], key=abs)[::-1]
        np.testing.assert_allclose(found.eigenvalues.numpy(), values, rtol=1e-3)


def test_given_bases_are_scored_as_they_are(exact):
    _, model, task = exact
    svd = ms.decompose(ms.collect_writes(model, task))
    whole = ms.hessian_attribution(model, task, svd)
    bases = {
        "two of them": whole.vectors[:, 3:5],
        "random too": ms.random_subspace(svd.rank, 6, seed=1),
    }
    found = ms.hessian_attribution(model, task, svd, bases=bases)
    assert list(found.bases) == ["Hessian", "two of them", "random too", "random"]
    for name in ("eigenvalues", "projections", "slopes", "integrated", "measured"):
        torch.testing.assert_close(
            getattr(found.bases["two of them"], name), getattr(whole, name)[3:5]
        )
    other = found.bases["random too"]
    assert len(other) == 6
    assert not other.converged.any()
    with pytest.raises(KeyError, match="random"):
        other.control  # noqa: B018


def test_bases_of_many_weights_are_scored_by_products(exact):
    _, model, task = exact
    mine = ms.random_subspace(6144, 5).basis
    found = ms.hessian_attribution(
        model, task, "blocks.1.mlp.*", pairs=2, bases={"mine": mine}
    ).bases["mine"]
    with open_session(model, [task], gradients=True) as session:
        f = objective_over(session, task, "blocks.1.mlp.*")
    with evaluation(model, gradients=True):
        for u, value in zip(mine.T, found.eigenvalues, strict=True):
            product = torch.func.jvp(
                torch.func.grad(lambda w: f.log_probs(w[None]).sum().exp()), (f.point,), (u,)
            )[1]
            assert float(u @ product) == pytest.approx(float(value), rel=1e-8)


def test_the_control_is_of_random_directions_and_seeded(exact):
    _, model, task = exact
    svd = ms.decompose(ms.collect_writes(model, task))
    found, same, other = (ms.hessian_attribution(model, task, svd, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(found.control.measured, same.control.measured)
    assert not torch.equal(found.control.measured, other.control.measured)
    expected = ms.random_subspace(svd.rank, min(svd.rank, CONTROLS), 0).basis
    torch.testing.assert_close(found.control.vectors, expected)
    assert (found.control.objective, found.control.parts, found.control.value) == (
        found.objective,
        found.parts,
        found.value,
    )


def test_the_batch_size_changes_nothing(exact):
    _, model, task = exact
    svd = ms.decompose(ms.collect_writes(model, task))
    whole = ms.hessian_attribution(model, task, svd)
    for size in (1, 7):
        small = ms.hessian_attribution(model, task, svd, batch_size=size)
        torch.testing.assert_close(
            small.measured, whole.measured, rtol=1e-9, atol=1e-12 * whole.value
        )
        torch.testing.assert_close(
            small.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=1e-12 * whole.value
        )


def test_a_piece_of_a_direction_has_the_shape_of_its_weight(exact):
    _, model, task = exact
    found = ms.hessian_attribution(
        model, task, ["blocks.0.mlp.in.weight", "blocks.1.mlp.in.weight"], pairs=2
    )
    piece = found.part("blocks.1.mlp.in.weight")
    assert piece.shape == (2, 64, 32)
    torch.testing.assert_close(piece.flatten(1).T, found.vectors[2048:])
    with pytest.raises(KeyError, match=r"no part 'blocks.2': it has \['blocks.0.mlp.in.weight'"):
        found.part("blocks.2")


def test_a_weight_may_be_named_in_several_ways_and_comes_once(exact):
    _, model, task = exact
    same = ["blocks.0.mlp.in.weight", "blocks.0.mlp.up_proj.weight", "blocks.0.mlp.[iu]*"]
    found = [ms.collect_gradients(model, task, names) for names in (same[0], same[1], same)]
    assert found[0].parts == found[1].parts == found[2].parts == ((same[0], (64, 32)),)
    assert torch.equal(found[0].values, found[1].values)
    assert torch.equal(found[0].values, found[2].values)


def test_tied_weights_move_together():
    model, task = tiny("GPT-2", tiny_hf("GPT-2").double()), tiny_task()
    found = ms.hessian_attribution(model, task, "embed.weight", pairs=1, objective="log_prob")
    raw = tiny_hf("GPT-2").double()
    weight = raw.transformer.wte.weight.detach()

    def f(w):
        both = {"transformer.wte.weight": w.view_as(weight), "lm_head.weight": w.view_as(weight)}
        logits = functional_call(raw, both, (task.tokens[None],), tie_weights=False).logits
        return logits[0, task.scored].log_softmax(-1).gather(-1, task.continuation[:, None]).sum()

    gradient = torch.func.grad(f)(weight.flatten())
    assert float(found.slopes) == pytest.approx(float(gradient @ found.vectors[:, 0]), rel=1e-6)


@pytest.mark.fault(34)
def test_fused_attention_is_set_aside_for_the_call():
    model = tiny("Llama")
    query = torch.randn(1, 2, 4, 8, requires_grad=True)

    def second_derivative():
        out = (
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            .square()
            .sum()
        )
        (slope,) = torch.autograd.grad(out, query, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), query)[0]

    with pytest.raises(RuntimeError, match="flash_attention"):  # fused kernels have none
        second_derivative()
    with evaluation(model, gradients=True):
        assert second_derivative().isfinite().all()
    with pytest.raises(RuntimeError, match="flash_attention"):
        second_derivative()


@pytest.mark.fault(34)
def test_a_model_with_fused_attention_gives_what_an_eager_one_gives():
    from transformers import AutoModelForCausalLM

    raw = tiny_hf("Llama")
    fused = AutoModelForCausalLM.from_config(raw.config, attn_implementation="sdpa").eval()
    fused.load_state_dict(raw.state_dict())
    model, eager, task = tiny("Llama", fused), tiny("Llama"), tiny_task()
    results = [
        ms.hessian_attribution(m, task, "blocks.0.ln1.weight", objective="log_prob")
        for m in (model, eager)
    ]
    torch.testing.assert_close(results[0].eigenvalues, results[1].eigenvalues, rtol=1e-3, atol=1e-3)


@pytest.mark.fault(23, 24)
def test_the_users_hooks_and_train_mode_take_part_and_stay(exact):
    _, model, task = exact
    frozen = next(model.parameters())
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: 0.5 * x)
    model.train(True)
    frozen.requires_grad = False
    try:
        with pytest.warns(UserWarning, match="train mode|already has hooks"):
            found = ms.hessian_attribution(model, task, "blocks.1.ln1.weight", objective="log_prob")
        assert model.training
        assert not frozen.requires_grad
        assert [
            len(point.fwd_hooks)
            for point in model.hook_dict.values()
            if point.name == "blocks.0.mlp.hook_out"
        ][:1] == [1]
        assert any(note.startswith("hooks of the user at blocks.0") for note in found.source.notes)
    finally:
        model.reset_hooks()
        model.train(False)
        frozen.requires_grad = True
    halved = [("blocks.0.hook_mlp_out", lambda x, hook: 0.5 * x)]
    with torch.no_grad():
        logits = model.run_with_hooks(task.tokens[None], fwd_hooks=halved)
    expected = logits[0, task.scored].log_softmax(-1).gather(-1, task.continuation[:, None]).sum()
    assert found.value == pytest.approx(float(expected))


def test_a_hook_that_hides_the_slope_is_noticed(real):
    last = f"blocks.{real.n_layers - 1}.hook_resid_post"
    real.model.add_hook(last, lambda x, hook: (x + x.detach()) / 2)  # half of the slope is seen
    options = {"pairs": 2, "path_steps": 4, "batched_hooks": True}
    try:
        with pytest.warns(UserWarning, match="something in it hides") as said:
            ms.hessian_attribution(real.model, real.task, real.svd, **options)
    finally:
        real.model.reset_hooks()
    (hidden,) = (str(w.message) for w in said if "something in it hides" in str(w.message))
    rises = r"f rises by (\S+) along itself, but running the model says (\S+): something in it"
    estimated, actual = map(float, re.search(rises, hidden).groups())
    assert 0.005 < estimated <= 0.02
    assert actual == pytest.approx(2 * estimated, rel=0.05)


@pytest.mark.fault(36)
def test_an_improbable_text_stays_finite_where_float32_would_overflow(real):
    tokens = torch.cat(
        [
            torch.tensor([1]),
            torch.randint(3, 512, (30,), generator=torch.Generator().manual_seed(1)),
        ]
    )
    task = ms.Task(
        tokens=tokens, prompt_length=1
    )  # random: without its weights the model thinks it e^100 times as probable
    logs = ms.hessian_attribution(real.model, task, "ln_final.weight", objective="log_prob")
    assert logs.baseline - logs.value > 88.8
    found = ms.hessian_attribution(real.model, task, "ln_final.weight", path_steps=64)
    assert found.baseline == pytest.approx(math.exp(logs.baseline), rel=1e-4)
    assert found.integrated.isfinite().all()
    assert found.path_error < 0.05 * abs(found.value - found.baseline)


def test_an_f_that_is_not_finite_without_some_component_is_said():
    with pytest.warns(
        UserWarning, match="f is not finite at w = 0, or with some directions removed"
    ):
        found = ms.hessian_attribution_of(lambda w: w.log().sum(), torch.tensor([2.0, 3.0]))
    assert found.share.isnan().all()
    assert found.integrated.isnan().all()
    assert found.to_pandas().nearer.isna().all()
    for entries in (3, 3000):
        with pytest.raises(ValueError, match="The Hessian of f is not finite at w"):
            ms.hessian_attribution_of(lambda w: w.abs().pow(1.5).sum(), torch.zeros(entries))


def test_a_function_that_vmap_does_not_take_is_run_point_by_point():
    strange = ms.hessian_attribution_of(
        lambda w: w.prod() if w[0].item() > -100 else w.sum(), torch.tensor([3.0, 2.0]).double()
    )
    plain = ms.hessian_attribution_of(torch.prod, torch.tensor([3.0, 2.0]).double())
    torch.testing.assert_close(strange.measured, plain.measured)
    torch.testing.assert_close(strange.integrated, plain.integrated)


def test_few_products_still_give_as_many_pairs_as_asked(exact, silent):
    _, model, task = exact
    found = ms.hessian_attribution(model, task, "blocks.1.mlp.*", pairs=9, max_products=2)
    assert len(found) == 9
    assert found.products == 12


@pytest.mark.fault(35)
def test_a_shared_eigenvalue_comes_as_often_as_it_is_there():
    curvatures = torch.cat(
        [torch.full((10,), 3.0), torch.linspace(1, 2, 20), torch.zeros(2970)]
    ).double()
    found = ms.hessian_attribution_of(
        lambda w: (curvatures * w.square()).sum() / 2, torch.ones(3000).double(), pairs=20
    )
    torch.testing.assert_close(found.eigenvalues, curvatures.sort(descending=True).values[:20])


def test_directions_of_one_layer_are_not_used_elsewhere_without_a_word(real, silent):
    layer = ms.decompose(ms.collect_writes(real.model, real.task), per_layer=True)[3]
    warnings.simplefilter("always")
    with pytest.warns(
        UserWarning,
        match=f"{2 * real.n_layers} sites are edited, but the directions were computed from 2 sites",
    ):
        ms.hessian_attribution(real.model, real.task, layer)


def test_a_basis_for_another_w_is_refused(real):
    svd = real.svd
    basis = ms.gradient_basis(ms.collect_gradients(real.model, real.task, svd, components=["mlp"]))
    with pytest.raises(
        ValueError,
        match=rf"'mine' is of gradients with respect to gains of {svd.rank} directions \(.*but w is gains of {svd.rank}",
    ):
        ms.hessian_attribution(real.model, real.task, svd, bases={"mine": basis})


def test_the_model_is_left_as_it_was(exact, silent):
    _, model, task = exact
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    wanting = {name: weight.requires_grad for name, weight in model.named_parameters()}
    weights = [id(weight) for weight in model.parameters()]
    for over in ("*", "blocks.9.*", ms.find_sites(model)):
        try:
            ms.hessian_attribution(model, task, over, pairs=1, max_products=8)
        except KeyError:
            assert over == "blocks.9.*"
    assert weights == [id(weight) for weight in model.parameters()]
    assert wanting == {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert torch.is_grad_enabled()
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_derivatives_are_there_in_a_mode_without_gradients_too(exact, mode):
    _, model, task = exact
    with mode():
        svd = ms.decompose(ms.collect_writes(model, task))
        over = (svd, "blocks.0.ln1.weight", ms.find_sites(model, layers=[0], components=["mlp"]))
        inside = [ms.hessian_attribution(model, task, each) for each in over]
        own = ms.hessian_attribution_of(torch.prod, torch.tensor([3.0, 2.0]))
        gradients = ms.collect_gradients(model, task, svd)
    for each, found in zip(over, inside, strict=True):
        torch.testing.assert_close(
            found.eigenvalues, ms.hessian_attribution(model, task, each).eigenvalues
        )
    assert own.eigenvalues.tolist() == pytest.approx([1, -1])
    assert gradients.values.any()


@pytest.mark.fault(22)
def test_an_exception_inside_leaves_the_weights_alone(exact, monkeypatch):
    _, model, task = exact
    from mechsvd.attribution import objective

    before = [weight.clone() for weight in model.parameters()]

    def fails(*args, **options):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(objective, "score", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        ms.hessian_attribution(model, task, "blocks.0.*")
    assert all(
        torch.equal(a, b) and b.requires_grad
        for a, b in zip(before, model.parameters(), strict=True)
    )


@pytest.mark.fault(26)
def test_memory_that_runs_out_halves_the_batch(exact, monkeypatch):
    _, model, task = exact
    from mechsvd.attribution.curvature import Curvature

    whole = ms.hessian_attribution(model, task, "blocks.0.ln1.weight")
    plain = Curvature._backward

    def small(self, rows):
        if len(rows) > 4:
            raise torch.OutOfMemoryError
        return plain(self, rows)

    monkeypatch.setattr(Curvature, "_backward", small)
    with pytest.warns(UserWarning, match="Out of memory with"):
        found = ms.hessian_attribution(model, task, "blocks.0.ln1.weight")
    torch.testing.assert_close(found.eigenvalues, whole.eigenvalues)


@pytest.mark.fault(26)
def test_more_vectors_than_memory_are_refused_with_the_bytes(exact, monkeypatch):
    _, model, task = exact
    from mechsvd.attribution import curvature

    monkeypatch.setattr(curvature, "free_bytes", lambda device: 2**20)
    with pytest.raises(
        MemoryError,
        match=r"5 eigenpairs of 6,144 entries need 36 vectors, 0.0 GiB, but 0.0 GiB are free",
    ):
        ms.hessian_attribution(model, task, "blocks.1.mlp.*", pairs=5)


def test_an_attribution_is_saved_and_loaded(exact, tmp_path):
    _, model, task = exact
    found = ms.hessian_attribution(model, task, "blocks.0.ln1.weight")
    found.save(tmp_path / "found.safetensors")
    loaded = ms.Attribution.load(tmp_path / "found.safetensors")
    assert loaded.to_pandas().equals(found.to_pandas())
    assert loaded.control.to_pandas().equals(found.control.to_pandas())
    assert repr(loaded) == repr(found)
    assert loaded.part("blocks.0.ln1.weight").shape == (32, 32)
    assert loaded.source.tokens == (tuple(task.tokens.tolist()),)


@pytest.mark.fault(37)
def test_the_table_says_which_estimate_was_nearer_and_what_is_noise(real):
    found = ms.hessian_attribution(real.model, real.task, real.svd)
    table = found.to_pandas()
    promised = ["eigenvalue", "projection", "linear", "quadratic", "measured", "residual"]
    assert [column for column in table.columns if column in promised] == promised
    assert table.eigenvalue.abs().is_monotonic_decreasing
    assert set(table.nearer) == {"linear", "quadratic"}
    errors = (
        (table.linear - table.measured).abs() / table.measured.abs(),
        (table.quadratic - table.measured).abs() / table.measured.abs(),
    )
    np.testing.assert_allclose(table.linear_error, errors[0])
    np.testing.assert_allclose(table.quadratic_error, errors[1])
    assert (table.nearer == "quadratic").sum() > 40
    assert 0 < found.noise_floor < 1e-4 * found.value
    assert (table.is_noise == (table.measured.abs() <= found.noise_floor)).all()
    assert len(repr(found).splitlines()) == 3


def test_what_does_not_depend_on_w_is_said(exact):
    _, model, task = exact
    last = ms.find_sites(model, layers=[1], components=["mlp"])
    with pytest.warns(
        UserWarning, match="f does not depend on w here: its gradient and its Hessian are zero"
    ):
        found = ms.hessian_attribution(
            model, task, last, positions=[len(task.tokens) - 1]
        )  # nothing is scored behind it
    assert not found.measured.any()
    assert found.share.isnan().all()
    with pytest.warns(UserWarning, match="f does not depend on w here"):
        ms.hessian_attribution_of(lambda w: torch.tensor(2.0), torch.ones(3))


@pytest.mark.fault(35)
def test_pairs_that_do_not_converge_are_marked_and_warned_of(exact):
    _, model, task = exact
    with pytest.warns(
        UserWarning,
        match=r"of 5 eigenpairs did not converge to a residual of 1e-12·\|λ\| in 24 products; .* Allow more `max_products`",
    ):
        found = ms.hessian_attribution(
            model, task, "blocks.1.mlp.*", pairs=5, tolerance=1e-12, max_products=24
        )
    assert not found.converged.all()
    assert list(found.to_pandas().converged) == found.converged.tolist()
    single = tiny("Llama")
    with pytest.warns(
        UserWarning,
        match=r"marks them\. Perhaps rounding allows no better: a model in dtype=torch.float64",
    ):
        ms.hessian_attribution(
            single, task, "blocks.1.mlp.*", pairs=5, tolerance=1e-9, max_products=4000
        )


def test_a_function_that_is_not_finite_is_refused(exact):
    with pytest.raises(ValueError, match=r"f is not finite at w, so nothing can be attributed"):
        ms.hessian_attribution_of(lambda w: w.sum().log(), -torch.ones(3))
    with pytest.raises(ValueError, match="The gradient of f is not finite"):
        ms.hessian_attribution_of(lambda w: w.sqrt().sum(), torch.zeros(3))
    model, task = tiny("Llama"), tiny_task()
    with torch.no_grad():
        next(model.parameters())[task.tokens[2]] = torch.inf
    with pytest.raises(ValueError, match=r"position 2.* the weight embed\.weight holds them"):
        ms.hessian_attribution(model, task, "blocks.0.ln1.weight", check=False)


@pytest.mark.fault(36)
def test_a_probability_that_underflows_is_refused_and_its_logarithm_is_not(exact):
    model, task = tiny("Llama"), tiny_task(length=60, prompt_length=2)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(50)
        list(model.parameters())[-1].mul_(200)
    if float(ms.measure(model, task, [ms.chain()]).clean_run.log_prob) > -746:
        pytest.fail("the task is too probable for this test")
    with pytest.raises(
        ValueError,
        match=r'nats, so its probability is too small.*attribute the logarithm by `objective="log_prob"`',
    ):
        ms.hessian_attribution(model, task, "blocks.0.ln1.weight")
    found = ms.hessian_attribution(model, task, "blocks.0.ln1.weight", objective="log_prob")
    assert found.eigenvalues.isfinite().all()


def test_a_decomposition_of_another_model_is_refused(exact, meaning_svd):
    _, model, task = exact
    with pytest.raises(ValueError, match="d_model 128, but the model's is 32"):
        ms.hessian_attribution(model, task, meaning_svd)
    other = tiny("Llama")
    with pytest.raises(ValueError, match="come from different models"):
        ms.hessian_attribution(model, task, svd_of(other, task))


def test_two_tasks_must_share_w_in_gradients_of_writes(exact):
    _, model, task = exact
    sites = ms.find_sites(model, layers=[1])
    with pytest.raises(
        ValueError, match=r"w differ in shape: \('blocks.1.hook_attn_out', \(9, 32\)\)"
    ):
        ms.collect_gradients(model, [task, tiny_task(length=11)], sites)
    assert (
        len(ms.collect_gradients(model, [task, tiny_task(length=11)], sites, positions=[2, 3]))
        == 4 + 6
    )
