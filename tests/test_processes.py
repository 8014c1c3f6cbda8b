"""Two processes give what one gives, all of it to both of them, and go on after one was killed.

Run by `torch.distributed.run`, this file is what the processes do.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

import mechsvd as ms
from mechsvd.edits.hooks import bind
from mechsvd.engine import processes
from mechsvd.engine.passes import _Sizes
from mechsvd.engine.progress import progress_bar
from mechsvd.engine.resuming import Kept
from tests.conftest import tiny, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore")


def third_logit(logits, clean, task):
    return logits[:, -1, 3] - clean[-1, 3]


def setting():
    model = tiny("Llama")
    texts = [tiny_task(seed=seed) for seed in range(3)] + [tiny_task(7, 3)]
    return model, texts, ms.decompose(ms.collect_writes(model, texts))


def numbers(result):
    return torch.from_numpy(result.to_pandas().select_dtypes("number").to_numpy("float64"))


CALLS = {
    "a sweep of an odd number of rows": lambda m, t, svd: ms.sweep_rank(m, t[0], svd, range(6)),
    "texts of two lengths": lambda m, t, svd: ms.sweep_rank(m, t, svd, batch_size=7),
    "fewer rows than processes": lambda m, t, svd: ms.measure(m, t[0], ms.keep(svd)),
    "any edits": lambda m, t, svd: ms.measure(m, t, [ms.keep(svd, 5), lambda x, hook: 0.5 * x]),
    "a ranking": lambda m, t, svd: ms.rank_directions(m, t[0], svd),
    "a user's metric": lambda m, t, svd: ms.sweep_rank(m, t, svd, metric=third_logit),
    "a search": lambda m, t, svd: ms.critical_rank(m, t[0], svd),
    "held out": lambda m, t, svd: ms.fit_and_measure(m, t, 2, ranks=[0, 5, 9]),
}


def documents():
    return [task.tokens.tolist() for task in (tiny_task(5 + i, 3, seed=i) for i in range(9))]


def stream(model, count=9, unknown=False, **options):
    texts = [ms.Task(torch.tensor(ids), 1) for ids in documents()[:count]]
    if unknown:
        texts[1].tokens[-1] = 10**6
    return ms.stream_writes(model, texts, **options)


def floors(model, texts, svd):
    measured = ms.measure(
        model, texts, [ms.keep(svd, 5)], metric=ms.kl_divergence, noise_floor=True
    )
    return torch.tensor([part.noise_floor for part in measured.parts])


def long_sweep(model, texts, svd, path=None):
    return ms.sweep_rank(model, texts, svd, batch_size=4, metric=third_logit, checkpoint=path)


def main(folder):
    """What each process does."""
    model, texts, svd = setting()
    killed_while(lambda: long_sweep(model, texts, svd, folder / "run"), folder / "group")
    distributed.init_process_group("gloo")
    number = distributed.get_rank()
    found = {name: numbers(call(model, texts, svd)) for name, call in CALLS.items()}
    found |= {"floors": floors(model, texts, svd), "whole": numbers(long_sweep(model, texts, svd))}
    ran = after_batches(-1)
    found["resumed"] = numbers(long_sweep(model, texts, svd, folder / "run"))
    found |= {"ran": torch.tensor(ran), "no bar": torch.tensor(progress_bar(1, "", True).disable)}
    for name, one in streams(model, folder).items():
        one.save(folder / f"{name} {number}")
    said = [
        raised(lambda: ms.sweep_rank(model, texts, svd, metric=failing(number))),
        raised(lambda: ms.sweep_rank(model, texts[number], svd)),
        raised(lambda: ms.measure(model, texts[0], ms.keep(ms.span(random_vectors(number))))),
        raised(lambda: stream(model, skip_bos=bool(number))),
        raised(lambda: stream(model, unknown=True)),
    ]
    (folder / f"said {number}").write_text("\n".join(said))
    found["after"] = numbers(ms.sweep_rank(model, texts[0], svd, range(6)))
    torch.save(found, folder / f"tables {number}")
    distributed.destroy_process_group()


def killed_while(call, group):
    """Make a call in a job of its own, whose processes are killed after a few batches.

    They are forked, since a new process imports for seconds.
    """
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL
        return
    method = f"file://{group}"
    distributed.init_process_group("gloo", init_method=method, rank=number, world_size=count)
    after_batches(3 + 2 * number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    try:
        call()
    finally:
        os._exit(1)


def after_batches(batches, act=None):
    """Act after some kept batches; the list grows by the rows of each that ran."""
    ran, add = [], Kept.add

    def counted(self, count, part):
        add(self, count, part)
        ran.append(count)
        if len(ran) == batches:
            act()

    Kept.add = counted
    return ran


def streams(model, folder):
    return {
        "streamed": stream(model),
        "kept": stream(model, checkpoint=folder / "stream"),
        "again": stream(model, checkpoint=folder / "stream"),
        "merged": ms.merge([stream(model, shard=(i, 2)) for i in range(2)]),
        "one document": stream(model, count=1),
    }


def failing(number):
    def metric(logits, clean, task):
        if number == 1:
            raise LookupError("a metric of mine")
        return logits[:, 0, 0]

    return metric


def random_vectors(seed):
    return torch.randn(32, 3, generator=torch.Generator().manual_seed(seed))


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("job")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.test_processes", str(folder)]
    job = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def tables(folder):
    return [torch.load(folder / f"tables {number}", weights_only=True) for number in range(2)]


@pytest.fixture(scope="module")
def alone():
    return setting()


@pytest.mark.parametrize("name", CALLS)
def test_two_processes_give_what_one_gives(name, tables, alone):
    first, second = (table[name] for table in tables)
    assert first.equal(second)
    torch.testing.assert_close(first, numbers(CALLS[name](*alone)), rtol=1e-4, atol=1e-4)


def test_their_noise_floors_are_of_the_same_size(tables, alone):
    first, second = (table["floors"] for table in tables)
    ratios = first / floors(*alone)
    assert first.equal(second)
    assert ((ratios > 0.1) & (ratios < 10)).all()


@pytest.mark.fault(27)
def test_after_one_was_killed_they_go_on_to_the_same_bits(tables):
    for table in tables:
        assert table["resumed"].equal(table["whole"])
    shares = [len(table["whole"]) + 4 for table in tables]  # 4 texts have a clean run
    ran = [int(table["ran"].sum()) for table in tables]
    assert all(0 < rows < share / 2 for rows, share in zip(ran, shares, strict=True))


@pytest.mark.parametrize("name", ["streamed", "kept", "again", "merged", "one document"])
def test_a_stream_is_that_of_all_documents(name, folder, alone):
    first, second = (ms.WriteStream.load(folder / f"{name} {number}") for number in range(2))
    whole = stream(alone[0], count=1 if name == "one document" else 9)
    assert (first.documents, first.tokens) == (whole.documents, whole.tokens)
    for field in ("count", "mean", "scatter"):
        value = getattr(first.moments, field)
        assert value.equal(getattr(second.moments, field))
        torch.testing.assert_close(value, getattr(whole.moments, field), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        first.decompose().singular_values, whole.decompose().singular_values, rtol=1e-4, atol=1e-4
    )


def test_each_process_has_its_own_files_and_the_first_has_the_bar(folder, tables):
    names = {path.name for path in folder.iterdir()}
    assert {"run.0-of-2", "run.1-of-2", "stream.0-of-2", "stream.1-of-2"} <= names
    assert not {"run", "stream"} & names
    assert [bool(table["no bar"]) for table in tables] == [False, True]


def test_what_one_process_raises_all_raise_and_other_calls_are_not_mixed(folder, tables):
    first, second = ((folder / f"said {number}").read_text().split("\n") for number in range(2))
    assert second[0] == "LookupError: a metric of mine"
    assert first[0] == (
        "RuntimeError: Process 1 of 2 failed, so all stop. LookupError: a metric of mine"
    )
    for said in (*first[1:4], *second[1:4]):
        assert said.startswith("RuntimeError: Processes ")
        assert "made different calls" in said
    assert "of 2 failed, so all stop. ValueError" in first[4]
    assert second[4].startswith("ValueError: ")
    for table in tables:  # and the next call is right again
        assert table["after"].equal(table["a sweep of an odd number of rows"])


def test_a_group_of_one_process_is_one_process(alone, tmp_path):
    model, texts, svd = alone
    whole = numbers(ms.sweep_rank(model, texts, svd))
    streamed = stream(model)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        path = tmp_path / "run"
        assert numbers(ms.sweep_rank(model, texts, svd, checkpoint=path)).equal(whole)
        assert path.exists()
        again = stream(model)
        assert again.moments.scatter.equal(streamed.moments.scatter)
        assert again.places[0].shard == (0, 1)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 7, 16])
def test_shares_are_neighbours_and_together_all_rows(rows, count, monkeypatch):
    shares = []
    for number in range(count):
        monkeypatch.setattr(processes, "this_process", lambda number=number: (number, count))
        shares.append(processes.own_share(torch.arange(rows)))
    assert torch.cat(shares).tolist() == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Elsewhere(torch.Tensor):
    """A tensor of another device: an operation with one of this device is an error."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        items = [part for a in args for part in (a if isinstance(a, list | tuple) else [a])]
        here = [t for t in items if type(t) is torch.Tensor and t.ndim]
        assert function is torch.Tensor.to or not here, f"{function.__name__} on two devices"
        return super().__torch_function__(function, types, args, kwargs or {})


EDITS = {
    "a gate": lambda writes, svd: ms.keep(svd, 3),
    "a rest per edit": lambda writes, svd: ms.gate(
        svd.subspace(3), torch.rand(2, 3), rest=torch.rand(2)
    ),
    "a baseline": lambda writes, svd: ms.ablate(svd.subspace(3), baseline=ms.mean_baseline(writes)),
    "ridge": lambda writes, svd: ms.shrink(svd, 0.5),
    "a basis per site": lambda writes, svd: ms.keep(ms.decompose(writes, per="site"), 3),
    "a chain": lambda writes, svd: ms.chain(ms.keep(svd, 9), ms.shift(torch.ones(32))),
}


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_follows_the_device_of_the_activation(name, alone):
    model, texts, svd = alone
    edit = EDITS[name](ms.collect_writes(model, texts), svd)
    for site in ms.find_sites(model):
        x, sizes = torch.randn(2, 5, 32), _Sizes(2)
        here = bind(edit, site)(x)
        there = bind(edit, site, observe=sizes)(x.as_subclass(Elsewhere))
        assert isinstance(there, Elsewhere)
        assert isinstance(sizes.kept[0], Elsewhere)
        torch.testing.assert_close(there.as_subclass(torch.Tensor), here)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


def test_a_job_without_a_group_is_warned_that_each_runs_everything(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="one of 2 processes, but they have no process group"):
        ms.collect_writes(tiny("Llama"), tiny_task())
