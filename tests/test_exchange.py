"""Subspaces of mechsvd and of TransformerLens: one span, the same numbers from both libraries."""

import dataclasses
import sys

import pytest
import torch

import mechsvd as ms
from mechsvd.edits.exchange import from_transformer_lens, to_transformer_lens

analysis = pytest.importorskip("transformer_lens.tools.analysis")
if not hasattr(analysis, "SubspaceBasis"):
    pytest.skip("this TransformerLens has no SubspaceBasis", allow_module_level=True)


def pairs():
    """Pairs of subspaces of several ranks and dtypes, some with shared directions."""
    draw = lambda rank, seed: ms.random_subspace(24, rank, seed)
    a, b, c = draw(5, 0), draw(5, 1), draw(9, 2)
    shared = ms.span(torch.cat([a.basis[:, :2], b.basis], dim=1))
    single = [ms.Subspace(subspace.basis.float()) for subspace in (b, c)]
    return [(a, b), (a, c), (shared, a), (single[0], single[1]), (a, a)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_there_and_back_is_exact(dtype, rank):
    subspace = ms.Subspace(ms.random_subspace(24, rank).basis.to(dtype))
    again = from_transformer_lens(to_transformer_lens(subspace))
    assert torch.equal(again.basis, subspace.basis)
    assert (again.basis.dtype, again.source) == (dtype, None)


def test_the_directions_of_writes_go_there_and_back_with_their_source(real):
    subspace = real.svd.subspace(9)
    again = from_transformer_lens(to_transformer_lens(subspace), real.svd.source)
    assert torch.equal(again.basis, subspace.basis)
    edited = ms.measure(real.model, real.task, [ms.keep(again), ms.keep(subspace)])
    assert torch.equal(edited.log_prob[0], edited.log_prob[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_other_fields_are_those_of_transformer_lens_for_the_same_columns(dtype):
    columns = ms.random_subspace(24, 7).basis.to(dtype)
    own = to_transformer_lens(ms.Subspace(columns))
    theirs = analysis.orthonormal_subspace(columns)
    assert type(own) is type(theirs)
    for field in dataclasses.fields(own):
        mine, other = getattr(own, field.name), getattr(theirs, field.name)
        if field.name == "basis":
            torch.testing.assert_close(mine @ mine.T, other @ other.T)
        elif isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, other)
        else:
            assert mine == pytest.approx(other, rel=1e-5), field.name


def test_transformer_lens_and_mechsvd_find_the_same_span_of_some_vectors():
    vectors = torch.randn(24, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vectors[:, 5] = vectors[:, 0] - vectors[:, 1]
    theirs, own = from_transformer_lens(analysis.orthonormal_subspace(vectors)), ms.span(vectors)
    assert theirs.rank == own.rank == 5
    torch.testing.assert_close(theirs.basis @ theirs.basis.T, own.basis @ own.basis.T)
    cut = from_transformer_lens(analysis.orthonormal_subspace(vectors, rank=2))
    assert cut.rank == 2
    torch.testing.assert_close(ms.keep(own)(cut.basis.T), cut.basis.T)


@pytest.mark.parametrize("first, second", pairs())  # noqa: PT006
def test_the_projection_kernel_is_the_overlap_and_has_the_same_angles(first, second):
    kernel = analysis.projection_kernel(to_transformer_lens(first), to_transformer_lens(second))
    overlap = ms.overlap([first, second])
    assert float(kernel.score) == pytest.approx(float(overlap.values[0, 1]), rel=1e-5)
    # an angle from its cosine alone is no better than the root of the rounding
    torch.testing.assert_close(
        kernel.angles.double(), ms.principal_angles(first, second), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("rank", [1, 5, 23])
def test_the_moments_of_random_subspaces_are_the_same(rank):
    theirs = analysis.random_projection_kernel_moments(24, rank)
    overlap = ms.overlap([ms.random_subspace(24, rank, seed) for seed in (0, 1)])
    assert float(overlap.expected[0, 1]) == pytest.approx(theirs.mean)
    assert float(overlap.deviation[0, 1]) ** 2 == pytest.approx(theirs.variance)


def test_an_interchange_keeps_in_the_subspace_what_keep_keeps_and_drops_what_ablate_drops():
    if not hasattr(analysis, "SubspaceInterchange"):
        pytest.skip("this TransformerLens has no SubspaceInterchange")
    subspace = ms.random_subspace(24, 5)
    interchange = analysis.SubspaceInterchange(to_transformer_lens(subspace).basis)
    base, source = torch.randn(2, 7, 24, dtype=torch.float64)
    zero = torch.zeros_like(base)
    torch.testing.assert_close(interchange(zero, source), ms.keep(subspace)(source))
    torch.testing.assert_close(interchange(base, zero), ms.ablate(subspace)(base))
    torch.testing.assert_close(
        interchange(base, source), ms.ablate(subspace)(base) + ms.keep(subspace)(source)
    )


def test_a_basis_from_transformer_lens_of_a_models_weight_spans_its_directions(real):
    from mechsvd.engine.weights import weight_svd

    w_o = real.model.blocks[0].attn.W_O.detach()
    theirs = analysis.orthonormal_subspace(w_o[0].T)  # one head
    head = from_transformer_lens(theirs, real.svd.source)
    every = weight_svd(real.model, "blocks.0.attn.o.weight")
    overlap = ms.overlap([head, every.subspace(every.rank)])
    assert float(overlap.values[0, 1]) == pytest.approx(head.rank, rel=1e-5)


def test_what_transformer_lens_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="`subspace` has no directions, but a SubspaceBasis"):
        to_transformer_lens(ms.Subspace(torch.empty(4, 0)))
    loose = ms.Subspace(torch.eye(4)[:, :2] * 1.0002)
    with pytest.raises(ValueError, match=r"orthonormal to 0.0004, but TransformerLens requires"):
        to_transformer_lens(loose)
    to_transformer_lens(ms.span(loose.basis))


def test_transformer_lens_refuses_to_compare_bases_of_two_precisions():
    double = ms.random_subspace(24, 5)
    single = ms.Subspace(ms.random_subspace(24, 5, 1).basis.float())
    both = to_transformer_lens(single), to_transformer_lens(double)
    with pytest.raises(ValueError, match="basis columns must be orthonormal"):
        analysis.projection_kernel(*both)
    assert ms.overlap([single, double]).values.isfinite().all()


def basis_with(**fields):
    return dataclasses.replace(to_transformer_lens(ms.Subspace(torch.eye(6)[:, :2])), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"basis": 2 * torch.eye(6)[:, :2]}, "must have orthonormal columns"),
        ({"basis": torch.eye(6)[:, [0, 0]]}, "must have orthonormal columns"),
        ({"basis": torch.eye(6)[:, :2] * torch.nan}, "must be finite"),
        ({"basis": torch.eye(6)[:, :2] + 0j}, "must be a real float matrix .* torch.complex64"),
        ({"basis": torch.eye(6)[:, :2].long()}, "must be a real float matrix .* torch.int64"),
        ({"basis": torch.eye(6)[0]}, r"must be a real float matrix .* of shape \[6\]"),
        ({"basis": [[1.0]]}, "must be a real float matrix .* is list"),
        ({"basis": torch.eye(6)[:2]}, r"has shape \[2, 6\], but its `input_shape`"),
        ({"rank": 1}, r"has shape \[6, 2\], but its `input_shape` and `rank` say \[6, 1\]"),
        ({"input_shape": (5, 2)}, r"`input_shape` and `rank` say \[5, 2\]"),
    ],
)  # fmt: skip
def test_what_a_subspace_cannot_hold_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_transformer_lens(basis_with(**fields))


@pytest.mark.parametrize("value", [torch.eye(3), None, ms.random_subspace(4, 2)])
def test_another_object_is_refused_by_name(value):
    name = type(value).__name__
    with pytest.raises(
        TypeError, match=f"must be a SubspaceBasis of TransformerLens, but is {name}"
    ):
        from_transformer_lens(value)


@pytest.mark.fault(40)
def test_a_transformer_lens_without_the_class_is_named(monkeypatch):
    subspace = ms.Subspace(torch.eye(3)[:, :1])
    monkeypatch.delattr(sys.modules["transformer_lens.tools.analysis"], "SubspaceBasis")
    with pytest.raises(ImportError, match="has no `SubspaceBasis`, but 3.9.0 and 4.3.0 have it"):
        to_transformer_lens(subspace)
