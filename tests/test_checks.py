"""Warnings stand at the user's line, and options may be generators."""

import warnings

import pytest
import torch

import mechsvd as ms
from mechsvd.checks import about, once, warn
from mechsvd.model.evaluation import OtherHooks
from mechsvd.report.build import reproduce
from mechsvd.report.choices import Choices
from tests.conftest import tiny, tiny_task


def of_two_sites(model, task):
    return ms.decompose(ms.collect_writes(model, task, layers=[0]))


SAID = {  # what warns, and a word of it
    "decompose": (lambda model, task, svd: ms.decompose(torch.ones(1, 2, 8)), "is unseen"),
    "sweep_rank": (
        lambda model, task, svd: ms.sweep_rank(model, task, svd, [0]),
        "12 sites are edited",
    ),
    "sweep_ridge": (
        lambda model, task, svd: ms.sweep_ridge(model, task, svd, [1.0]),
        "12 sites are edited",
    ),
    "rank_directions": (
        lambda model, task, svd: ms.rank_directions(model, task, svd),
        "12 sites are edited",
    ),
    "estimate_ranking": (
        lambda model, task, svd: ms.estimate_ranking(model, task, svd),
        "12 sites are edited",
    ),
    "critical_rank": (
        lambda model, task, svd: ms.critical_rank(model, task, svd, 1e4),
        "12 sites are edited",
    ),
    "describe": (
        lambda model, task, svd: ms.describe(model, svd, [0], task),
        "12 sites are edited",
    ),
    "hessian_attribution": (
        lambda model, task, svd: ms.hessian_attribution(model, task, svd, pairs=1),
        "12 sites are edited",
    ),
    "interactions": (
        lambda model, task, svd: ms.interactions(
            model, task, svd, {"axes": torch.eye(svd.rank + 1)}, rows=2, draws=1
        ),
        "12 sites are edited",
    ),
    "collect_gradients": (
        lambda model, task, svd: ms.collect_gradients(model, task, svd),
        "12 sites are edited",
    ),
    "measure": (
        lambda model, task, svd: ms.measure(model, task, [lambda x, hook: x * torch.nan]),
        "not finite",
    ),
    "generate": (
        lambda model, task, svd: ms.generate(
            model, "a b c", max_new_tokens=model.cfg.n_ctx - 3, truncate="left"
        ),
        "oldest tokens",
    ),
    "truncate": (
        lambda model, task, svd: ms.Task.from_text(model, "a " * 600, "b", truncate="left"),
        "oldest tokens",
    ),
    "no BOS": (
        lambda model, task, svd: ms.Task.from_text(model, "a", "b", prepend_bos=False),
        "no BOS token",
    ),
    "token ids": (
        lambda model, task, svd: ms.generate(model, task.tokens[1:], max_new_tokens=1),
        "no BOS token",
    ),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", SAID)
def test_each_warning_stands_at_the_line_of_the_user(name, embedded):
    task = ms.Task.from_text(embedded, "I believe the", " end")
    with warnings.catch_warnings(record=True):
        svd = of_two_sites(embedded, task)
    call, word = SAID[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call(embedded, task, svd)
    found = [w for w in said if word in str(w.message)]
    assert found, [str(w.message) for w in said]
    assert {w.filename for w in found} == {__file__}


def test_sites_that_were_not_decomposed_are_counted(embedded, meaning):
    with warnings.catch_warnings(record=True):
        svd = of_two_sites(embedded, meaning)
    with pytest.warns(
        UserWarning,
        match="12 sites are edited, but the directions were computed from 2 sites; pass the",
    ):
        ms.sweep_rank(embedded, meaning, svd, [0])


def test_warnings_about_one_of_several_begin_with_it():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for name in ("first", "second"):
            with about(name):
                warn("It is rough.")
        warn("It is rough.")
    assert [str(w.message) for w in said] == [
        "first: It is rough.",
        "second: It is rough.",
        "It is rough.",
    ]


def test_a_run_over_several_prompts_says_what_is_common_once_and_of_what_the_rest_is(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        OtherHooks, "one_row", False
    )  # one row per pass is slow, and tested elsewhere
    model, lengths = tiny("Llama"), {"short": 6, "long": 9}
    tasks = {name: lambda length=length: tiny_task(length) for name, length in lengths.items()}
    hook = ("blocks.1.hook_resid_pre", lambda x, hook: x)
    with model.hooks(fwd_hooks=[hook]), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        choices = Choices(step=8, options={"components": ["attn"]})
        reproduce(model, tasks, tmp_path, choices=choices, say=lambda _: None)
    texts = [str(w.message) for w in said]
    assert sum("already has hooks" in text for text in texts) == 1
    rest = [text for text in texts if "already has hooks" not in text]
    assert {*lengths} <= {text.split(": ")[0] for text in rest} <= {*lengths, "several prompts"}
    assert len(rest) == len({*rest})


@pytest.mark.fault(45)
@pytest.mark.parametrize("name", ["layers", "positions"])
def test_a_generator_serves_every_pass_of_a_call(name, silent):
    """`critical_rank`, `collect_gradients` and others go over their options more than once."""
    model, task = tiny("Llama"), tiny_task()
    values = {"layers": [0, 1], "positions": [*range(2, len(task.tokens))]}[name]
    fresh = lambda: {name: (value for value in values)}
    kept = {name: values}
    tasks = [task, task]
    svd = ms.decompose(ms.collect_writes(model, task, layers=kept.get("layers")))
    ways = {
        "writes": lambda o: ms.collect_writes(model, tasks, layers=o.get("layers")).values,
        "sweep": lambda o: ms.sweep_rank(model, task, svd, [0, 9, 29], **o).measurement.log_probs,
        "ranking": lambda o: ms.rank_directions(model, task, svd, **o).effect,
        "ridge": lambda o: ms.sweep_ridge(model, task, svd, [0.1, 1.0], **o).measurement.log_probs,
        "search": lambda o: ms.critical_rank(model, task, svd, **o).margins,
        "gradients": lambda o: ms.collect_gradients(model, tasks, svd, **o).values,
        "measure": lambda o: ms.measure(model, task, [ms.keep(svd.subspace(3))], **o).log_probs,
    }
    for way, call in ways.items():
        assert torch.equal(call(kept), call(fresh())), way


@pytest.mark.fault(45)
def test_ranks_orders_and_strengths_may_be_generators(silent):
    model, task = tiny("Llama"), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    back = range(svd.rank - 1, -1, -1)
    ways = {
        "ranks": lambda f: ms.sweep_rank(model, task, svd, f([0, 9, 29])).measurement.log_probs,
        "order": lambda f: ms.sweep_rank(model, task, svd, [5], f(back)).measurement.log_probs,
        "order of a search": lambda f: ms.critical_rank(model, task, svd, order=f(back)).margins,
        "strengths": lambda f: (
            ms.sweep_ridge(model, task, svd, f([0.1, 1.0])).measurement.log_probs
        ),
    }
    for way, call in ways.items():
        assert torch.equal(call(list), call(lambda values: (value for value in values))), way


@pytest.mark.fault(45)
def test_once_leaves_anything_but_an_iterator_alone():
    values = [1, 2]
    assert once(values) is values
    assert once(None) is None
    assert once(iter(values)) == (1, 2)
