"""One session per call, one set of options, and weights that are read once."""

from contextlib import suppress

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.engine.session import MeasureOptions, RunOptions, open_session
from mechsvd.model import identity
from mechsvd.report.study import study_task
from tests.calls import CALLS as RUNNING
from tests.calls import small
from tests.conftest import tiny, tiny_task


@pytest.fixture
def reads(monkeypatch):
    """How often the weights of a model were read."""
    read, count = identity._digest, []
    monkeypatch.setattr(identity, "_digest", lambda model: count.append(1) or read(model))
    return count


def test_a_study_reads_the_weights_once(silent, reads):
    model, task = tiny("Llama"), tiny_task()
    study_task(model, "one", task, {"own": task.tokens[:2]})
    assert len(reads) == 1


def test_each_call_reads_them_once(silent, reads):
    model, task = tiny("Llama"), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    assert len(reads) == 1
    for calls, call in enumerate(
        (
            lambda: ms.measure(model, task, [ms.keep(svd.subspace(3))]),
            lambda: ms.sweep_rank(model, task, svd),
            lambda: ms.critical_rank(model, task, svd, 1e3),  # several rounds
            lambda: ms.hessian_attribution(model, task, svd, pairs=2),
            lambda: ms.collect_gradients(model, [task, task], svd),
            lambda: ms.generate_tasks(
                model, task.tokens[:3], [ms.keep(svd.subspace(3))], max_new_tokens=2
            ),
        ),
        start=2,
    ):
        call()
        assert len(reads) == calls


def test_a_model_changed_between_two_sessions_is_another_model(silent):
    model, task = tiny("Llama"), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="The basis and the model come from different models"):
        ms.sweep_rank(model, task, svd, [1])


@pytest.mark.fault(22)
def test_a_session_leaves_nothing_behind_after_an_exception(silent, reads):
    model = tiny("Llama")
    with suppress(ZeroDivisionError), open_session(model, [tiny_task()]) as session:
        session.provenance()
        raise ZeroDivisionError
    assert model not in identity._READ
    with open_session(model) as outer, open_session(model) as inner:
        assert outer.provenance().weights == inner.provenance().weights
    assert len(reads) == 2


CALLS = {**RUNNING, "fwd_hooks": lambda m, t, svd, **o: ms.fwd_hooks(m, ms.keep(svd, 1), **o)}
MISSPELT = {"layer": "layers", "component": "components", "position": "positions", "chek": "check"}


@pytest.mark.parametrize("name", CALLS)
def test_an_option_that_does_not_exist_is_refused_by_the_call_that_was_made(name):
    for wrong, right in MISSPELT.items():
        with pytest.raises(
            TypeError, match=rf"^`{name}` has no option `{wrong}`: did you mean `{right}`\?$"
        ):
            CALLS[name](*small(), **{wrong: 1})
    with pytest.raises(TypeError, match=rf"^`{name}` has no option `xyzzy`: it takes .*layers.*"):
        CALLS[name](*small(), xyzzy=1)


def test_an_option_given_twice_is_refused(embedded, meaning, meaning_svd):
    with pytest.raises(
        TypeError, match="`ranks` is given to `sweep_rank` twice: by its place and by its name"
    ):
        ms.sweep_rank(embedded, meaning, meaning_svd, [1], ranks=[2])
    with pytest.raises(
        TypeError, match="`rank_directions` has no option `noise_floor`"
    ):  # it measures it anyway
        ms.rank_directions(embedded, meaning, meaning_svd, noise_floor=False)


@pytest.mark.parametrize("name", RUNNING)
def test_every_call_that_runs_a_model_takes_every_option(name, silent, tmp_path):
    options = {"layers": None, "components": ["attn", "mlp"], "positions": None, "missing": "error"}
    options |= {
        "check": True,
        "batch_size": np.int64(40),
        "batched_hooks": False,
        "fast": True,
        "same_model": True,
        "progress": False,
        "at": None,
        "heads": None,
        "checkpoint": tmp_path / "kept",
    }
    assert set(options) == set(RunOptions.__optional_keys__)
    assert set(MeasureOptions.__optional_keys__) == {*options, "noise_floor", "metric"}
    CALLS[name](*small(), **options)
    with pytest.raises(
        ValueError, match="`batch_size` is 0, but must be a whole number of at least 1"
    ):
        CALLS[name](*small(), batch_size=0)


def test_writes_and_gradients_do_not_depend_on_the_batch_size(
    embedded, meaning, meaning_svd, silent
):
    tasks = [meaning, meaning, meaning]
    whole = ms.collect_writes(embedded, tasks).values
    assert torch.allclose(ms.collect_writes(embedded, tasks, batch_size=2).values, whole, atol=1e-4)
    slopes = ms.collect_gradients(embedded, tasks, meaning_svd).values
    assert torch.allclose(
        ms.collect_gradients(embedded, tasks, meaning_svd, batch_size=8).values, slopes, atol=1e-4
    )
