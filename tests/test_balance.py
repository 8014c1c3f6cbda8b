"""Balanced directions against the eigenvectors of W R, and against a planted subspace."""

import numpy as np
import pytest
import scipy.linalg
import torch

import mechsvd as ms
from mechsvd.linalg.balancing import balanced_basis

from .conftest import tiny_task
from .planted import planted

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.older]


def projector(vectors):
    columns = torch.linalg.qr(vectors).Q
    return columns @ columns.T


@pytest.mark.parametrize("side", ["read", "write"])
def test_the_first_span_the_eigenvectors_of_both_moments(side):
    generator = torch.Generator().manual_seed(0)
    writes, reads = (torch.randn(40, 10, generator=generator).double() for _ in range(2))
    writes = writes * torch.logspace(0, 1, 10)
    w, r = writes.T @ writes, reads.T @ reads
    values, directions = torch.linalg.eigh(w)
    basis, hankel = balanced_basis(directions.flip(1), values.flip(0).sqrt(), r, side)
    product = w @ r if side == "write" else r @ w
    eigenvalues, modes = np.linalg.eig(product.numpy())
    order = np.argsort(-eigenvalues.real)
    np.testing.assert_allclose(hankel.numpy() ** 2, eigenvalues.real[order], rtol=1e-8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(10).double())
    for k in (1, 4, 9):
        expected = projector(torch.from_numpy(modes.real[:, order[:k]].copy()))
        torch.testing.assert_close(basis[:, :k] @ basis[:, :k].T, expected, atol=1e-7, rtol=0)


def test_what_is_written_or_read_alone_comes_after_what_is_both():
    sizes = torch.tensor([9.0, 4.0, 2.0, 1.0]).double()  # the largest is hardly read
    reads = torch.diag(torch.tensor([0.01, 1.0, 1.0, 0.0]).double())
    basis, hankel = balanced_basis(torch.eye(4).double(), sizes, reads)
    assert hankel.tolist() == pytest.approx([4, 2, 0.9, 0])
    torch.testing.assert_close(basis.abs(), torch.eye(4).double()[:, [1, 2, 0, 3]])
    with pytest.raises(ValueError, match="`side` is 'both', but must be 'write' or 'read'"):
        balanced_basis(torch.eye(4), sizes, reads, "both")


def test_a_planted_subspace_comes_first():
    """The model reads six directions of what it writes; the others have no Hankel value."""
    model, subspace = planted()
    tasks = [tiny_task(14, 3, seed=seed) for seed in range(4)]
    found = ms.balanced_directions(model, tasks, side="read")
    assert float(ms.overlap([found.subspace(6), subspace]).values[0, 1]) > 5.999
    assert float(found.singular_values[6]) < 1e-3 * float(found.singular_values[5])
    per_site = ms.decompose(ms.collect_writes(model, tasks), per="site")
    sites = ms.balanced_directions(model, tasks, per_site, side="read")
    last = ms.principal_angles(sites[-1].subspace(3), subspace)
    assert float(last.max()) < 1e-2  # three of the six at the last site
    cost = ms.measure(model, tasks, [ms.keep(found, 6)], metric=ms.kl_divergence).effect
    assert float(cost.max()) < 1e-4


def test_they_are_made_of_the_moments_of_writes_and_reads(real):
    tasks = [ms.Task(real.task.tokens[:14], 6), ms.Task(real.task.tokens[:11], 5)]
    writes = ms.collect_writes(real.model, tasks)
    reads = ms.collect_reads(real.model, tasks, draws=5, seed=3)
    w, r = (v.values.flatten(0, 1).double() for v in (writes, reads))
    expected = scipy.linalg.eigvals((w.T @ w).numpy() @ (r.T @ r).numpy() / 5)
    svd = ms.decompose(writes)
    found = ms.balanced_directions(real.model, tasks, svd, draws=5, seed=3)
    squares = found.singular_values.double().square().numpy()
    np.testing.assert_allclose(squares[:20], np.sort(expected.real)[::-1][:20], rtol=1e-3)
    lengths = found.left.double().square().sum(dim=(0, 1))
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-3, atol=1e-3)
    along = writes.values.double() @ found.directions[:, 2].double()
    cosine = (along.flatten() @ found.left[..., 2].double().flatten()) / along.norm()
    assert float(cosine) == pytest.approx(1, abs=1e-4)
    assert "balanced" in found.source.notes[-1]


def test_each_site_is_balanced_with_its_own_gradients(real):
    task = ms.Task(real.task.tokens[:14], 6)
    bases = ms.decompose(ms.collect_writes(real.model, task), per="site")
    found = ms.balanced_directions(real.model, task, bases, draws=4)
    assert [one.source.hooks for one in found] == [one.source.hooks for one in bases]
    site = ms.find_sites(real.model)[3]
    alone = ms.balanced_directions(
        real.model, task, bases[3], draws=4, layers=[site.layer], components=[site.component]
    )
    torch.testing.assert_close(
        found[3].singular_values, alone.singular_values, rtol=1e-3, atol=1e-4
    )
    a, b = found[3].directions[:, :4], alone.directions[:, :4]
    torch.testing.assert_close(a @ a.T, b @ b.T, atol=1e-3, rtol=0)


def test_streamed_writes_and_missing_sites_are_refused(real):
    model, task = real.model, ms.Task(real.task.tokens[:10], 5)
    streamed = ms.stream_writes(model, ["Once upon a time"], context=16).decompose()
    with pytest.raises(ValueError, match="this decomposition is of streamed writes"):
        ms.balanced_directions(model, task, streamed, draws=2)
    bases = ms.decompose(ms.collect_writes(model, task), per="site")
    with pytest.raises(KeyError, match="No basis is of the site"):
        ms.balanced_directions(model, task, bases[:2], draws=2)
