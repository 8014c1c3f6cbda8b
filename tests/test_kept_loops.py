"""A call that is stopped at any moment goes on, and its tables are those of one that was not."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import mechsvd as ms
from mechsvd.engine import passes, resuming
from mechsvd.engine.checkpoint import Checkpoint
from mechsvd.engine.passes import _Setup

from .conftest import tiny, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def small():
    model = tiny("Llama")
    texts = [tiny_task(seed=seed) for seed in range(3)] + [tiny_task(7, 3)]
    return model, texts, ms.decompose(ms.collect_writes(model, texts))


class Order:
    """An order of directions, with a table as results have."""

    def __init__(self, order):
        self.order = order

    def to_pandas(self):
        return pd.DataFrame({"direction": self.order.numpy()})


CALLS = {  # of every kind of loop; test_every_call.py has all calls
    "a sweep": lambda m, t, svd, **o: ms.sweep_rank(m, t[0], svd, **o),
    "sweeps with a metric and noise": lambda m, t, svd, **o: ms.sweep_rank(
        m, t, svd, metric=ms.kl_divergence, noise_floor=True, **o
    ),
    "rankings": lambda m, t, svd, **o: ms.rank_directions(m, t, svd, **o),
    "a search": lambda m, t, svd, **o: ms.critical_rank(m, t[0], svd, exhaustive=True, **o),
    "ridge": lambda m, t, svd, **o: ms.sweep_ridge(m, t[1], svd, **o),
    "attribution": lambda m, t, svd, **o: ms.hessian_attribution(m, t[0], svd, **o),
    "pairs": lambda m, t, svd, **o: ms.hessian_attribution(m, t[0], svd, pairs=4, **o),
    "from w": lambda m, t, svd, **o: ms.hessian_attribution(
        m, t[:2], svd, pairs=4, basis="from_w", **o
    ),
    "interactions": lambda m, t, svd, **o: ms.interactions(
        m, t[:2], svd, {"axes": torch.eye(svd.rank)}, rows=4, batch_size=30, **o
    ),
    "ridge by curvature": lambda m, t, svd, **o: ms.shrink_by_curvature(
        m, t[:2], svd, ms.hessian_attribution(m, t[0], svd, pairs=4), batch_size=30, **o
    ),
    "gradients": lambda m, t, svd, **o: ms.collect_gradients(m, t[:2], svd, **o),
    "reads": lambda m, t, svd, **o: ms.collect_reads(m, t[:2], draws=9, **o),
    "elimination": lambda m, t, svd, **o: Order(
        ms.order_by_elimination(m, t[:2], svd, share=0.8, **o)
    ),
    "learning": lambda m, t, svd, **o: ms.learn_subspace(m, t, 5, steps=4, **o),
    "worst gains": lambda m, t, svd, **o: ms.worst_gains(m, t[0], svd, 3, steps=3, **o),
}
GRADIENTS = ("reads", "learning")  # slow, row by row
ATTRIBUTION = (
    *GRADIENTS,
    "attribution",
    "pairs",
    "from w",
    "interactions",
    "ridge by curvature",
    "gradients",
    "worst gains",
)


def same(first, second):
    return first.to_pandas().equals(second.to_pandas())


class Stop(BaseException):
    """Not an Exception, as Ctrl-C is none."""


def stop_after(monkeypatch, batches):
    """Stop after some batches; the list grows by one entry per batch that ran."""
    counted, add = [], resuming.Kept.add

    def stopping(self, count, part):
        add(self, count, part)
        counted.append(count)
        if len(counted) == batches:
            raise Stop

    monkeypatch.setattr(resuming.Kept, "add", stopping)
    return counted


@pytest.mark.fault(27)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_was_stopped_goes_on_bit_for_bit(name, small, tmp_path, monkeypatch):
    path, call = tmp_path / "run", CALLS[name]
    options = {} if name in ATTRIBUTION else {"batch_size": 5}
    whole = call(*small, **options)
    with monkeypatch.context() as patch:
        every = stop_after(patch, -1)
        kept = call(*small, checkpoint=tmp_path / "all", **options)
    assert same(kept, whole)
    rng = random.Random(name)
    for stop in sorted({1, len(every), rng.randint(1, len(every))}):
        path.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Stop):
                call(*small, checkpoint=path, **options)
        with monkeypatch.context() as patch:
            rest = stop_after(patch, -1)
            resumed = call(*small, checkpoint=path, **options)
        assert same(resumed, whole)
        assert len(rest) == len(every) - stop  # nothing ran twice
    with monkeypatch.context() as patch:
        again = stop_after(patch, 1)
        assert same(call(*small, checkpoint=path, **options), whole)
        assert not again  # a finished call runs nothing


def test_another_free_memory_gives_no_other_batches(small, tmp_path, monkeypatch):
    model, texts, svd = small
    whole = ms.sweep_rank(model, texts[0], svd, batch_size=7)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        patch.setattr("mechsvd.engine.session.rows_per_pass", lambda *_: 7)
        with pytest.raises(Stop):
            ms.sweep_rank(model, texts[0], svd, checkpoint=tmp_path / "run")
    monkeypatch.setattr("mechsvd.engine.session.rows_per_pass", lambda *_: 3)
    assert same(ms.sweep_rank(model, texts[0], svd, checkpoint=tmp_path / "run"), whole)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [0, 2]}, "`ranks` is [0, 2], but was [0, 1, 2]"),
        ({"layers": [1]}, "`layers` is [1], but was not given"),
        ({"metric": ms.kl_divergence}, "`metric` is"),
        ({"task": tiny_task(seed=9)}, "`task` is"),
    ],
)
def test_another_call_is_refused_and_shown(small, tmp_path, change, message):
    model, texts, svd = small
    given = {"task": texts[0], "svd": svd, "ranks": [0, 1, 2], "checkpoint": tmp_path / "run"}
    ms.sweep_rank(model, **given)
    with pytest.raises(ValueError, match="is the checkpoint of another call") as error:
        ms.sweep_rank(model, **{**given, **change})
    assert message in str(error.value)


@pytest.mark.fault(28)
def test_another_model_or_function_is_refused(small, tmp_path):
    model, texts, svd = small
    shifts = [ms.shift(torch.full((32,), size)) for size in (0.1, 0.2)]
    ms.measure(model, texts[0], shifts[:1], checkpoint=tmp_path / "shift")
    with pytest.raises(ValueError, match=r"`edits` is \[.*Shift.*\], but was"):
        ms.measure(model, texts[0], shifts[1:], checkpoint=tmp_path / "shift")
    path = tmp_path / "run"
    bare = dataclasses.replace(svd, source=None)
    ms.sweep_rank(model, texts[0], bare, [0, 1], checkpoint=path)
    with pytest.raises(ValueError, match="the call is `rank_directions`, but was `sweep_rank`"):
        ms.rank_directions(model, texts[0], bare, checkpoint=path)
    with pytest.raises(ValueError, match="weights: "):
        ms.sweep_rank(ms.reinitialised(model, 1), texts[0], bare, [0, 1], checkpoint=path)


@pytest.mark.fault(29, 30)
def test_a_second_process_is_refused_and_a_missing_folder_named(small, tmp_path):
    model, texts, svd = small
    refused = []

    def metric(logits, clean, task):
        if not refused:
            code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), 6)"
            lock = tmp_path / ".run.lock"
            done = subprocess.run([sys.executable, "-c", code, lock], capture_output=True)
            refused.append(done.returncode)
        return logits.sum(dim=(1, 2))

    ms.sweep_rank(model, texts[0], svd, [0, 1], metric=metric, checkpoint=tmp_path / "run")
    assert refused == [1]
    with pytest.raises(FileNotFoundError, match="create it first"):
        ms.sweep_rank(model, texts[0], svd, checkpoint=tmp_path / "none" / "run")


@pytest.mark.fault(31)
def test_a_damaged_checkpoint_is_refused_and_named(small, tmp_path):
    model, texts, svd = small
    path = tmp_path / "run"
    ms.sweep_rank(model, texts[0], svd, [0, 1], checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"run.*Delete the file, or give another path"):
        ms.sweep_rank(model, texts[0], svd, [0, 1], checkpoint=path)


def test_the_clean_run_of_a_resumed_call_is_made_again_only_where_it_is_needed(
    small, tmp_path, monkeypatch
):
    model, texts, svd = small
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            ms.sweep_rank(model, texts[0], svd, batch_size=5, checkpoint=tmp_path / "run")
    forwards, forward = [], _Setup.forward
    monkeypatch.setattr(
        passes._Setup, "forward", lambda *given: forwards.append(1) or forward(*given)
    )
    ms.sweep_rank(model, texts[0], svd, batch_size=5, checkpoint=tmp_path / "run")
    (rows,) = Checkpoint.load(tmp_path / "run").state.to_pandas()["rows"].tolist()
    assert len(forwards) == -(-rows // 5) - 3 + 1


KILLED = """
import sys, warnings, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import mechsvd as ms
from tests.conftest import tiny, tiny_task
model, texts = tiny("Llama"), [tiny_task(seed=seed) for seed in range(3)]
svd = ms.decompose(ms.collect_writes(model, texts))
print("ready", flush=True)
found = ms.sweep_rank(model, texts, svd, batch_size=2, checkpoint=sys.argv[1])
found.to_pandas().to_json(sys.argv[2])
"""


@pytest.mark.fault(27)
def test_killed_by_the_system_the_table_is_the_same(small, tmp_path):
    def start(path, out):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    process = start(tmp_path / "run", tmp_path / "run.json")
    process.stdout.readline()
    while not (tmp_path / "run").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = len(Checkpoint.load(tmp_path / "run").state.loops[0].counts)
    assert start(tmp_path / "run", tmp_path / "run.json").wait() == 0
    assert begun < len(Checkpoint.load(tmp_path / "run").state.loops[0].counts)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as in the other process
        model, texts, svd = small
        svd = ms.decompose(ms.collect_writes(model, texts[:3]))
        whole = ms.sweep_rank(model, texts[:3], svd, batch_size=2).to_pandas().to_json()
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "run.json").read_text() == whole
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run.json"}


@pytest.mark.fault(28)
def test_arguments_are_described_alike_whenever_they_are_made():
    code = """[lambda x: x in {"a", "b"}, ms.shift(torch.ones(3)), ms.kl_at_most(1.0), object()]"""
    first, second = (resuming.describe_value(eval(code)) for _ in range(2))
    assert first == second
    assert resuming.describe_value(frozenset("ba")) == {"set": ["'a'", "'b'"]}  # in no random order


@pytest.mark.fault(28)
def test_arguments_are_described_so_that_they_differ():
    values = [
        None, True, 1.5, "a", [1, 2], {"a": 1}, torch.ones(2), torch.ones(2).double(),
        torch.zeros(2), list(range(500)), list(range(501)), ms.kl_divergence, ms.log_prob, tiny_task(),
        tiny_task(seed=1), ms.Subspace(torch.eye(3)[:, :1]), ms.Subspace(torch.eye(3)[:, 1:2]),
        lambda x, hook: 0.5 * x, lambda x, hook: 0.7 * x, lambda x, hook: x.relu(), torch.float16, torch.float64,
        *(ms.shift(torch.ones(3) * factor) for factor in (1, 2)), {1, 2}, {1, 3}, np.float32(2.5),
        *(ms.logit_difference(5, wrong) for wrong in (7, 8)), *(torch.nn.Linear(2, 2) for _ in range(2)),
        *(ms.kl_at_most(nats) for nats in (0.1, 0.2)), *(partial(max, number) for number in (3, 4)),
        *(Order(order).to_pandas for order in (torch.arange(2), torch.arange(3))), Order, torch,
    ]  # fmt: skip
    described = [json.dumps(resuming.describe_value(value)) for value in values]
    assert len(set(described)) == len(values)
    assert described[17:22] == [
        json.dumps(resuming.describe_value(value)) for value in values[17:22]
    ]
    assert not any(" at 0x" in text for text in described)  # no address, which differs in each run
    assert max(map(len, described)) < 400
