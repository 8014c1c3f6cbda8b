"""Directions from Lanczos started at w or at ∇f, against whole Hessians and closed forms."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

import mechsvd as ms
from mechsvd.linalg.eigenpairs import ritz_pairs
from mechsvd.results import _digest
from tests.conftest import tiny
from tests.test_attribution import in_double, subclass_of
from tests.test_eigenpairs import symmetric


def small_hf():
    """A random Llama of 300 weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0, std=0.6)
    return in_double(model)


@pytest.fixture(scope="module")
def small():
    """The model of 300 weights, its task, and f of all weights from the raw modules."""
    raw, model = small_hf(), tiny("Llama", small_hf())
    raw.config._attn_implementation = "sdpa"  # the eager one has its softmax in float32
    for module in list(model.modules()):
        if hasattr(module, "_masked_softmax"):  # asked for float32 too
            whole = lambda self, scores, dtype=None: super(type(self), self)._masked_softmax(scores)
            subclass_of(module, _masked_softmax=whole)
    task = ms.Task(tokens=torch.tensor([0, 5, 3, 11, 7, 2, 16]), prompt_length=3)
    return raw.requires_grad_(False), model, task


@pytest.fixture(scope="module")
def from_w(small):
    _, model, task = small
    return ms.hessian_attribution(model, task, "*", objective="log_prob", basis="from_w", pairs=12)


def raw_function(raw, task, found):
    """log p as a function of all weights in the order of the parts of w, and the point."""
    ours = {
        "embed": "embed_tokens", "ln_final": "norm", "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj", "mlp.in": "mlp.up_proj", "mlp.out": "mlp.down_proj",
        "ln1": "input_layernorm", "ln2": "post_attention_layernorm",
    }  # fmt: skip
    names = []
    for name, _ in found.parts:
        stem = name.removesuffix(".weight").removeprefix("blocks.0.")
        place = "layers.0." if name.startswith("blocks") else ""
        names.append("lm_head.weight" if stem == "unembed" else f"model.{place}{ours[stem]}.weight")
    plain = dict(raw.named_parameters())
    shapes = [plain[name].shape for name in names]
    assert [tuple(shape) for shape in shapes] == [shape for _, shape in found.parts]

    def f(w):
        pieces = w.split([shape.numel() for shape in shapes])
        weights = {n: x.view(s) for n, x, s in zip(names, pieces, shapes, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            logits = functional_call(raw, weights, (task.tokens[None],)).logits
        return logits[0, task.scored].log_softmax(-1).gather(-1, task.continuation[:, None]).sum()

    return f, torch.cat([plain[name].flatten() for name in names])


def test_from_w_all_weights_agree_with_a_dense_hessian(small, from_w):
    raw, _, task = small
    f, w = raw_function(raw, task, from_w)
    assert from_w.vectors.shape == (300, 12)
    dense, slope, u = hessian(f)(w), torch.func.grad(f)(w), from_w.vectors
    # the Krylov space of the dense Hessian and w, by an independent route: QR of H's powers on w
    powers = [w / w.norm()]
    for _ in range(11):
        rest = dense @ powers[-1]
        for _ in range(2):
            rest = rest - sum(q * (q @ rest) for q in powers)
        powers.append(rest / rest.norm())
    space = torch.stack(powers, dim=1)
    values, inner = torch.linalg.eigh(space.T @ dense @ space)
    order = values.abs().argsort(descending=True)
    torch.testing.assert_close(from_w.eigenvalues, values[order], rtol=1e-6, atol=1e-8)
    expected = space @ inner[:, order]
    torch.testing.assert_close((expected * u).sum(dim=0).abs(), torch.ones(12).double())
    assert float(from_w.projections.square().sum()) == pytest.approx(float(w @ w), rel=1e-12)
    torch.testing.assert_close(u @ from_w.projections, w, rtol=0, atol=1e-12)
    assert float(from_w.linear.sum()) == pytest.approx(float(w @ slope), rel=1e-9)
    curved = (from_w.eigenvalues * from_w.projections.square()).sum()
    assert float(curved) == pytest.approx(float(w @ dense @ w), rel=1e-9)
    residuals = (dense @ u - u * from_w.eigenvalues).norm(dim=0)
    torch.testing.assert_close(from_w.residuals, residuals, rtol=1e-5, atol=1e-9)
    removed = torch.stack([f(w - column * (column @ w)) for column in u.T])
    torch.testing.assert_close(from_w.measured, f(w) - removed, rtol=1e-8, atol=1e-10)
    assert (
        list(from_w.to_pandas().converged)
        == (residuals <= from_w.tolerance * from_w.eigenvalues.abs()).tolist()
    )


def test_as_many_steps_as_weights_give_all_that_the_dense_hessian_says_of_w(small):
    _, model, task = small
    options = {"objective": "log_prob", "tolerance": 1e-6}
    whole = ms.hessian_attribution(model, task, "*", **options)
    found = ms.hessian_attribution(model, task, "*", basis="from_w", pairs=300, **options)
    assert len(whole) == 300
    assert float(found.held.sum()) == pytest.approx(1, abs=1e-12)
    # w lies in few eigenspaces of an H with many zeros: those pairs agree with the dense ones
    loud = found.converged & (found.held > 1e-6)
    assert int(loud.sum()) >= 40
    gaps = (found.eigenvalues[loud, None] - whole.eigenvalues).abs()
    closest = gaps.argmin(dim=1)
    scale = float(whole.eigenvalues[0].abs())
    assert float(gaps.min(dim=1).values.max()) < 1e-9 * scale
    for name in ("held", "measured"):
        torch.testing.assert_close(
            getattr(found, name)[loud], getattr(whole, name)[closest], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("over", ["blocks.1.mlp.*", "gains"])
def test_ritz_vectors_from_w_hold_all_of_w_on_trained_models(real, over, silent):
    chosen = real.svd if over == "gains" else over
    found = ms.hessian_attribution(
        real.model, real.task, chosen, basis="from_w", pairs=10, path_steps=2
    )
    assert len(found) == 10
    norm = float(found.projections.square().sum())
    assert float(found.held.sum()) == pytest.approx(1, abs=1e-7)  # in single precision too
    assert norm == pytest.approx(found.norm**2, rel=1e-7)
    whole = ms.hessian_attribution(
        real.model, real.task, chosen, basis="largest", pairs=10, path_steps=2, tolerance=1e-2
    )
    assert float(whole.held.sum()) < 0.5
    # Ritz values lie between the ends of the spectrum
    assert found.eigenvalues.abs().max() <= whole.eigenvalues.abs().max() * 1.001
    assert "hold 1 of ‖w‖²" in repr(found)


def test_from_the_gradient_the_slopes_add_up_and_from_both_both_do(small):
    raw, model, task = small
    options = {"objective": "log_prob", "pairs": 7}
    steep = ms.hessian_attribution(model, task, "*", basis="from_gradient", **options)
    both = ms.hessian_attribution(model, task, "*", basis="from_both", **options)
    f, w = raw_function(raw, task, steep)
    gradient = torch.func.grad(f)(w)
    assert len(steep) == len(both) == 7
    for found in (steep, both):
        torch.testing.assert_close(found.vectors @ found.slopes, gradient, rtol=0, atol=1e-10)
    assert float(both.held.sum()) == pytest.approx(1, abs=1e-12)
    assert float(steep.held.sum()) < 0.99
    inner = both.vectors.T @ hessian(f)(w) @ both.vectors
    torch.testing.assert_close(inner, both.eigenvalues.diag(), rtol=0, atol=1e-9)


def test_a_space_that_closes_has_only_converged_pairs():
    # H has three eigenvalues on w: 2 (twice), −1 and 0
    values = torch.tensor([2.0, 2.0, -1.0, 0.0, 0.0, 5.0]).double()
    w = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 0.0]).double()
    found = ms.hessian_attribution_of(
        lambda x: (values * x.square()).sum() / 2, w, basis="from_w", pairs=6
    )
    torch.testing.assert_close(found.eigenvalues[:2], torch.tensor([2.0, -1.0]).double())
    assert len(found) == 3
    assert found.converged[:2].all()
    torch.testing.assert_close(found.held, torch.tensor([5.0, 9.0, 2.0]).double() / 16)
    torch.testing.assert_close(found.quadratic[:2], found.measured[:2])


def test_the_space_of_a_matrix_is_spanned_by_its_powers_in_single_precision_too():
    matrix = symmetric(torch.linspace(-3, 2, 200).double() ** 3)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        a, s = matrix.to(dtype), start.to(dtype)
        found = ritz_pairs(lambda v, a=a: a @ v, s, 11)
        u = found.vectors.double()
        assert found.products == u.shape[1] == 11
        torch.testing.assert_close(u.T @ u, torch.eye(11).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(u @ (u.T @ s.double()), s.double(), rtol=0, atol=1e-12)
        inner = u.T @ matrix @ u
        torch.testing.assert_close(inner, found.values.diag(), rtol=0, atol=30 * close)
    doubled = torch.cat([start[:, :1], 3 * start[:, :1]], dim=1)
    assert ritz_pairs(lambda v: matrix @ v, doubled, 5).vectors.shape == (200, 5)


def test_the_table_can_be_ordered_by_projection_and_by_what_is_measured(from_w):
    table = from_w.to_pandas()
    assert list(table.index) == list(range(12))
    np.testing.assert_allclose(table.held, table.projection**2 / from_w.norm**2)
    by_size, by_damage = (from_w.to_pandas(order=o) for o in ("projection", "measured"))
    assert by_size.projection.abs().is_monotonic_decreasing
    assert by_damage.measured.is_monotonic_decreasing
    assert not by_size.eigenvalue.abs().is_monotonic_decreasing
    for other in (by_size, by_damage):
        assert other.sort_index().equals(table)


def test_undefined_scores_come_last():
    with pytest.warns(UserWarning, match="f is not finite"):
        found = ms.hessian_attribution_of(
            lambda w: w.log().sum(), torch.tensor([2.0, 3.0]), bases={"axes": torch.eye(2)}
        )
    measured = torch.tensor([math.nan, 1.0])
    assert replace(found, measured=measured).order("measured").tolist() == [1, 0]


def test_a_zero_start_is_refused():
    with pytest.raises(ValueError, match="w is zero, so Lanczos cannot start from it"):
        ms.hessian_attribution_of(lambda w: w.cos().sum(), torch.zeros(3), basis="from_w")
    with pytest.raises(ValueError, match="∇f is zero, so Lanczos cannot start from it"):
        ms.hessian_attribution_of(
            lambda w: (w - 1).square().sum(), torch.ones(3), basis="from_both"
        )


@pytest.mark.fault(33)
def test_an_attribution_keeps_its_basis_and_a_file_without_it_still_loads(from_w, tmp_path):
    path, older = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    from_w.save(path)
    loaded = ms.Attribution.load(path)
    assert (loaded.basis, loaded.norm) == ("from_w", from_w.norm)
    assert loaded.to_pandas().equals(from_w.to_pandas())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    document = json.loads(metadata["mechsvd"])
    parts = [document["value"], *(item[1] for item in document["value"]["fields"]["beside"])]
    for part in parts:
        part["fields"].pop("norm")
        part["fields"].pop("basis", None)
    body = json.dumps(document)
    save_file(tensors, older, {**metadata, "mechsvd": body, "sha256": _digest(body, tensors)})
    old = ms.Attribution.load(older)
    assert old.basis == "given"
    assert old.held.isnan().all()
    assert "hold" not in repr(old)
    torch.testing.assert_close(old.measured, from_w.measured)


def test_several_texts_get_their_own_directions_in_one_table(small, tmp_path):
    _, model, task = small
    other = ms.Task(tokens=torch.tensor([0, 9, 4, 4, 12, 8]), prompt_length=2)
    options = {"objective": "log_prob", "basis": "from_w", "pairs": 4}
    found = ms.hessian_attribution(model, [task, other], "*", **options)
    alone = [ms.hessian_attribution(model, one, "*", **options) for one in (task, other)]
    assert len(found) == 2
    for part, single in zip(found.parts, alone, strict=True):
        assert part.to_pandas().equals(single.to_pandas())
        assert part.source.tokens == single.source.tokens
    table = found.to_pandas()
    assert list(table.task) == [0] * 4 + [1] * 4
    found.save(tmp_path / "several.safetensors")
    loaded = ms.Attributions.load(tmp_path / "several.safetensors")
    assert loaded.to_pandas().equals(table)
