"""Every public call that runs a model, on a small model: one table for all tests of what calls share."""

import functools
import inspect
import tempfile
import warnings
from itertools import chain, islice

import torch

import mechsvd as ms
from tests.conftest import tiny, tiny_task

FEW = {"draws": 3}
OTHERS = [tiny_task(seed=seed) for seed in range(4, 8)]  # texts of another kind


@functools.cache
def small():
    """A random Llama of two layers, three texts of one length, a shorter one, and their directions."""
    model = tiny("Llama")
    texts = [tiny_task(seed=seed) for seed in range(3)] + [tiny_task(7, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, texts, ms.decompose(ms.collect_writes(model, texts))


@functools.cache
def earlier():
    """The results that some calls go on from: an attribution and an estimate."""
    model, texts, svd = small()
    attribution = ms.hessian_attribution(model, texts[0], svd, pairs=2, path_steps=1)
    return attribution, ms.estimate_ranking(model, texts, svd)


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory()


def _few(tasks, count):
    """The first texts, of a list or of an iterable that can be read once."""
    return tasks[:count] if isinstance(tasks, list) else islice(tasks, count)


CALLS = {  # by the name of the call; t are tasks, and o its options
    "collect_writes": lambda m, t, svd, **o: ms.collect_writes(m, t, **o),
    "stream_writes": lambda m, t, svd, **o: ms.stream_writes(m, t, **o),
    "fold": lambda m, t, svd, **o: ms.fold(
        m, ms.keep(svd, 9), f"{_folder().name}/out", t, **o
    ),
    "donor_baseline": lambda m, t, svd, **o: ms.donor_baseline(m, t[0], **o),
    "optimal_baseline": lambda m, t, svd, **o: ms.optimal_baseline(m, _few(t, 2), svd, **o),
    "compare_baselines": lambda m, t, svd, **o: ms.compare_baselines(m, _few(t, 2), svd, **o),
    "measure": lambda m, t, svd, **o: ms.measure(m, t, [ms.keep(svd, 1), ms.keep(svd, 20)], **o),
    "sweep_rank": lambda m, t, svd, **o: ms.sweep_rank(m, t, svd, [0, 9, 20], **o),
    "rank_directions": lambda m, t, svd, **o: ms.rank_directions(m, t, svd, **o),
    "order_by_elimination": lambda m, t, svd, **o: ms.order_by_elimination(
        m, t, svd, share=0.8, **o
    ),
    "estimate_ranking": lambda m, t, svd, **o: ms.estimate_ranking(m, t, svd, **o),
    "refine_ranking": lambda m, t, svd, **o: ms.refine_ranking(m, t, svd, earlier()[1], top=2, **o),
    "sweep_ridge": lambda m, t, svd, **o: ms.sweep_ridge(m, t, svd, [0.1, 1.0], **o),
    "collect_reads": lambda m, t, svd, **o: ms.collect_reads(m, t, **FEW, **o),
    "balanced_directions": lambda m, t, svd, **o: ms.balanced_directions(m, t, svd, **FEW, **o),
    "read_write_angles": lambda m, t, svd, **o: ms.read_write_angles(m, t, 4, **FEW, **o),
    "learn_subspace": lambda m, t, svd, **o: ms.learn_subspace(m, t, 5, start=svd, steps=1, **o),
    "compare_orders": lambda m, t, svd, **o: ms.compare_orders(
        m, _few(t, 2), [9], orders=["singular value"], **o
    ),
    "dose_response": lambda m, t, svd, **o: ms.dose_response(m, _few(t, 2), svd, [0, 1], **o),
    "fit_and_measure": lambda m, t, svd, **o: ms.fit_and_measure(m, _few(t, 2), 2, ranks=[0, 9], **o),
    "describe": lambda m, t, svd, **o: ms.describe(m, svd, [0], _few(t, 1), **o),
    "measure_faithfulness": lambda m, t, svd, **o: ms.measure_faithfulness(m, t, svd, 3, **o),
    "worst_gains": lambda m, t, svd, **o: ms.worst_gains(m, _few(t, 2), svd, 3, steps=1, **o),
    "critical_rank": lambda m, t, svd, **o: ms.critical_rank(m, _few(t, 2), svd, 1e3, **o),
    "generate": lambda m, t, svd, **o: ms.generate(
        m, t[0].tokens[:5], ms.keep(svd, 9), max_new_tokens=2, **o
    ),
    "generate_tasks": lambda m, t, svd, **o: ms.generate_tasks(
        m, t[0].tokens[:5], [None, ms.keep(svd, 9)], max_new_tokens=2, **o
    ),
    "hessian_attribution": lambda m, t, svd, **o: ms.hessian_attribution(
        m, _few(t, 1), svd, pairs=1, path_steps=1, **o
    ),
    "collect_gradients": lambda m, t, svd, **o: ms.collect_gradients(m, t, svd, **o),
    "interactions": lambda m, t, svd, **o: ms.interactions(
        m, t, svd, {"axes": torch.eye(svd.rank)}, rows=2, draws=1, **o
    ),
    "shrink_by_curvature": lambda m, t, svd, **o: ms.shrink_by_curvature(
        m, t, svd, earlier()[0], [1.0], **o
    ),
    "sweep_adaptively": lambda m, t, svd, **o: ms.sweep_adaptively(m, t[0], svd, 5, checks=1, **o),
    "overlap_anchors": lambda m, t, svd, **o: ms.overlap_anchors(
        m, t, (2,), nulls=["random tokens"], **o
    ),
    "compare_with_random_texts": lambda m, t, svd, **o: ms.compare_with_random_texts(m, _few(t, 2), **o),
    "compare_with_literature": lambda m, t, svd, **o: ms.compare_with_literature(
        m, chain(t, OTHERS), "together", **o
    ),
    "contrast": lambda m, t, svd, **o: ms.contrast(
        m, {"a": t, "b": OTHERS}, 1, seeds=1, **o
    ),
    "contrast_sweep": lambda m, t, svd, **o: ms.contrast_sweep(
        m, {"a": t, "b": OTHERS}, (1,), (0.1,), seeds=1, **o
    ),
}  # fmt: skip


def running():
    """The names of the public functions that take a model and the options of a run."""
    return {
        name
        for name in ms.__all__
        if inspect.isfunction(call := getattr(ms, name))
        and "check" in getattr(_options(call), "__optional_keys__", ())
    }


def _options(call):
    last = [*inspect.signature(call).parameters.values()][-1]
    return getattr(last.annotation, "__args__", (None,))[0]
