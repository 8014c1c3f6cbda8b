"""What is told beforehand of a cost, against the rows that run and the line that a long loop prints."""

import pytest
import torch

import mechsvd as ms
from mechsvd.engine import batches
from mechsvd.engine.batches import run_batches
from mechsvd.report.choices import Choices
from mechsvd.report.plan import plan_report, study_rows, together_rows
from mechsvd.report.study import compare, study_task

from .conftest import tiny, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore")


def counting(monkeypatch):
    """The rows of all loops, with the weight that the plan gives those of derivatives."""
    counted = []

    def run(forward, order, size, halve, progress, what="rows", **options):
        counted.append((3.0 if what == "Hessian" else 1.0) * len(order))
        return run_batches(forward, order, size, halve, progress, what, **options)

    for module in ("engine.passes", "attribution.curvature", "attribution.gradients"):
        monkeypatch.setattr(f"mechsvd.{module}.run_batches", run)
    return counted


@pytest.mark.parametrize("quick", [False, True])
def test_the_rows_that_are_told_are_those_that_run(monkeypatch, quick):
    model, task = tiny("Llama"), tiny_task(12, 6)
    counted = counting(monkeypatch)
    choices = Choices(quick=quick)
    study_task(model, "a", task, {"own": task.tokens[:4]}, choices)
    assert sum(counted) / 1.5 <= study_rows(model, task, choices) <= 1.5 * sum(counted)


def test_the_rows_of_several_prompts_too(monkeypatch):
    model, tasks = tiny("Llama"), [tiny_task(12, 6, seed) for seed in range(3)]
    told = Choices(parts=("told",))
    studies = [
        study_task(model, f"{i}", task, {"own": task.tokens[:4]}, told)
        for i, task in enumerate(tasks)
    ]
    counted = counting(monkeypatch)
    compare(model, studies)
    steps = together_rows(model, tasks, {}).values()
    told = sum(rows for pairs in steps for rows, _ in pairs)
    assert sum(counted) / 1.5 <= told <= 1.5 * sum(counted)


def test_the_plan_is_one_line_with_everything_in_it():
    model = tiny("Llama")
    plan = plan_report(model, {"a": tiny_task(), "b": tiny_task(seed=1)}, {})
    assert plan.texts == 2
    line = str(plan)
    assert line.startswith(f"2 prompts: {plan.rows:,} rows in about ")
    assert "forward passes of" in line
    assert "MiB, about" in line
    quick = plan_report(model, {"a": tiny_task(), "b": tiny_task(seed=1)}, {}, Choices(quick=True))
    assert quick.rows <= plan.rows


def test_a_long_loop_tells_its_cost_after_the_first_batch(monkeypatch, capsys):
    monkeypatch.setattr(batches, "WORTH_TELLING", 0.0)
    run_batches(
        lambda rows: rows, torch.arange(10), 3, lambda size: size, True, "ranks", row_bytes=2**20
    )
    said = capsys.readouterr().err
    assert "ranks: 10 rows in 4 forward passes, 3 MiB each, about 0 s" in said
    assert said.count("forward passes") == 1
    run_batches(lambda rows: rows, torch.arange(10), 3, lambda size: size, False)
    assert "forward passes" not in capsys.readouterr().err


def test_a_call_in_a_script_tells_nothing(capsys):
    ms.sweep_rank(tiny("Llama"), tiny_task(), ms.decompose(torch.randn(1, 40, 32)), [0, 1])
    assert "forward passes" not in capsys.readouterr().err
