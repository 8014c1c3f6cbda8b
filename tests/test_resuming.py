"""A run that is killed at any moment and called again ends with the same bits; other calls are refused."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mechsvd as ms
from mechsvd.engine import checkpoint as checkpoint_file
from mechsvd.engine import stream as stream_file
from mechsvd.engine.checkpoint import describe, open_checkpoint
from tests.test_fields import SOURCE
from tests.test_stream import texts

SUBSPACES = [ms.Subspace(torch.eye(4)[:, :rank]) for rank in (1, 2, 3)]


def call(**arguments):
    return describe("count", {"n": 3, "kind": "slow", "over": (0, 1)} | arguments, SOURCE)


def test_a_state_is_found_again_by_the_same_call(tmp_path):
    path = tmp_path / "run.safetensors"
    with open_checkpoint(path) as file:
        assert file.resume(call()).state is None
        assert file.is_due()
        file.save(SUBSPACES[0])
        file.save(SUBSPACES[1])
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    with open_checkpoint(str(path)) as file:
        saved = file.resume(call())
        assert saved.state.rank == 2
        assert not saved.is_finished
        file.save(SUBSPACES[2], is_finished=True)
    loaded = ms.Checkpoint.load(path)
    assert loaded.is_finished
    assert len(repr(loaded).splitlines()) == 3
    assert loaded.to_pandas()["argument"].tolist() == ["n", "kind", "over"]


def test_without_a_path_nothing_is_kept():
    with open_checkpoint(None) as file:
        assert file.resume(call()).state is None
        assert not file.is_due()
        file.save(SUBSPACES[0])


CHANGES = {
    r"`n` is 4, but was 3\. Give the same": {"n": 4},
    '`kind` is "fast", but was "slow"; `over` is null, but was': {"kind": "fast", "over": None},
    "`more` is true, but was not given": {"more": True},
}


@pytest.mark.fault(28)
@pytest.mark.parametrize("message", CHANGES)
def test_another_call_is_refused_with_each_difference(message, tmp_path):
    path = tmp_path / "run"
    with open_checkpoint(path) as file:
        file.resume(call())
        file.save(SUBSPACES[0])
    before = path.read_bytes()
    with open_checkpoint(path) as file:
        with pytest.raises(ValueError, match=message):
            file.resume(call(**CHANGES[message]))
        file.save(SUBSPACES[1])  # of no call
    assert path.read_bytes() == before


@pytest.mark.fault(28)
def test_another_model_other_sites_and_other_hooks_are_refused(tmp_path):
    from dataclasses import replace

    path = tmp_path / "run"
    with open_checkpoint(path) as file:
        file.resume(call())
        file.save(SUBSPACES[0])
    for change, message in [
        ({"weights": "x"}, r"weights: x \(m\) and w \(m\)"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16"),
        ({"hooks": ()}, r"no sites, but there were 1 sites \(blocks.0.hook_mlp_out\)"),
        ({"notes": ("hooks of the user",)}, r"1 notes \(hooks of the user\), but there were"),
    ]:
        other = replace(call(), source=replace(SOURCE, **change))
        with open_checkpoint(path) as file, pytest.raises(ValueError, match=message):
            file.resume(other)
    with open_checkpoint(path) as file, pytest.raises(ValueError, match="the call is `sum`, but"):
        file.resume(replace(call(), call="sum"))


@pytest.mark.fault(31)
def test_what_is_no_checkpoint_stays_as_it_is(tmp_path):
    SUBSPACES[0].save(tmp_path / "mine")
    (tmp_path / "text").write_text("my notes")
    with open_checkpoint(tmp_path / "run") as file:
        file.resume(call())
        file.save(SUBSPACES[0])
    (tmp_path / "cut").write_bytes((tmp_path / "run").read_bytes()[:-5])
    for name, message in [
        ("mine", "holds a Subspace, not a Checkpoint.*or give another path"),
        ("text", "is truncated or not a safetensors file.*Delete the file"),
        ("cut", "is truncated.*Delete the file"),
    ]:
        before = (tmp_path / name).read_bytes()
        with open_checkpoint(tmp_path / name) as file, pytest.raises(ValueError, match=message):
            file.resume(call())
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.fault(30)
def test_where_nothing_can_be_written_is_known_before_anything_runs(
    embedded, tmp_path, monkeypatch
):
    documents = iter(["I believe"])
    with pytest.raises(FileNotFoundError, match="the folder .* does not exist; create it first"):
        ms.stream_writes(embedded, documents, checkpoint=tmp_path / "no" / "run")
    with pytest.raises(IsADirectoryError, match="`checkpoint` must be a file"):
        ms.stream_writes(embedded, documents, checkpoint=tmp_path)
    with open_checkpoint(None) as file:
        assert file.resume(call()) is not None

    def fail(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(checkpoint_file, "open", fail, raising=False)
    with pytest.raises(PermissionError, match=r"Cannot keep the checkpoint .*run: read-only\."):
        ms.stream_writes(embedded, documents, checkpoint=tmp_path / "run")
    assert next(documents) == "I believe"


@pytest.mark.fault(30)
def test_a_full_disk_is_an_error_and_leaves_the_last_state(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with open_checkpoint(path) as file:
        file.resume(call())
        file.save(SUBSPACES[0])

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            file.save(SUBSPACES[1])
    assert ms.Checkpoint.load(path).state.rank == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.fault(29)
def test_two_runs_cannot_use_one_checkpoint(embedded, tmp_path):
    path = tmp_path / "run"
    with open_checkpoint(path):
        with pytest.raises(
            RuntimeError, match=f"in use by another run .process {os.getpid()}.; wait"
        ):
            ms.stream_writes(embedded, ["I believe"], checkpoint=path)
        with open_checkpoint(tmp_path / "other"):
            pass
    with open_checkpoint(path):
        pass


@pytest.mark.fault(29)
def test_a_killed_process_leaves_no_lock_and_its_unfinished_file_is_removed(tmp_path):
    code = (
        "import sys, time\nfrom mechsvd.engine.checkpoint import open_checkpoint\n"
        "with open_checkpoint(sys.argv[1]):\n    print('locked', flush=True); time.sleep(60)"
    )
    path = tmp_path / "run"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(RuntimeError, match=f"in use by another run .process {process.pid}."),
            open_checkpoint(path),
        ):
            pass
        process.kill()
    (tmp_path / ".run.abc.mechsvd").write_bytes(b"half")
    (tmp_path / ".other.abc.mechsvd").write_bytes(b"of another file")
    with open_checkpoint(path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".other.abc.mechsvd"]


def test_saving_takes_at_most_a_tenth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    save = ms.Checkpoint.save
    monkeypatch.setattr(
        ms.Checkpoint, "save", lambda self, path: now.__setitem__(0, now[0] + 2) or save(self, path)
    )
    with open_checkpoint(tmp_path / "run") as file:
        file.resume(call())
        file.save(SUBSPACES[0])
        now[0] = 2 + 17.9
        assert not file.is_due()
        now[0] = 2 + 18.1
        assert file.is_due()


def same(one, other):
    """Whether two streams are the same to the last bit."""
    return all(
        torch.equal(getattr(one.moments, name), getattr(other.moments, name))
        for name in ("count", "mean", "scatter")
    ) and (one.places[0].fingerprint, repr(one)) == (other.places[0].fingerprint, repr(other))


@pytest.mark.fault(27)
@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_that_was_interrupted_goes_on_to_the_same_bits(
    embedded, tmp_path, monkeypatch, packing
):
    monkeypatch.setattr(stream_file, "WINDOW", 150)
    documents, options = texts(6), {"context": 40, "packing": packing, "skip_bos": True}
    whole = ms.stream_writes(embedded, documents, **options)

    def until(stop):
        for number, text in enumerate(documents):
            if number == stop:
                raise KeyboardInterrupt
            yield text

    path, reached = tmp_path / "run", []
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            ms.stream_writes(embedded, until(stop), checkpoint=path, **options)
        reached.append(ms.Checkpoint.load(path).state.tokens if path.exists() else 0)
    assert reached == sorted(reached)
    assert reached[-1] > 0
    resumed = ms.stream_writes(embedded, documents, checkpoint=path, **options)
    assert same(resumed, whole)
    runs, run = [], type(embedded).run_with_hooks
    monkeypatch.setattr(
        type(embedded), "run_with_hooks", lambda *args, **kw: runs.append(1) or run(*args, **kw)
    )
    assert same(ms.stream_writes(embedded, documents, checkpoint=path, **options), whole)
    assert not runs  # it was finished
    with pytest.raises(ValueError, match="finished after 6 documents, but the source has more"):
        ms.stream_writes(embedded, [*documents, "I"], checkpoint=path, **options)
    with pytest.raises(ValueError, match="The first 6 documents are not those"):
        ms.stream_writes(embedded, [*documents[:5], "I"], checkpoint=path, **options)
    with pytest.raises(ValueError, match="`context` is 41, but was 40"):
        ms.stream_writes(embedded, documents, checkpoint=path, **(options | {"context": 41}))
    with pytest.raises(ValueError, match=r"`shard` is \[0, 2\], but was \[0, 1\]"):
        ms.stream_writes(embedded, documents, checkpoint=path, shard=(0, 2), **options)
    with pytest.raises(ValueError, match="2 sites .*, but there were 12 sites"):
        ms.stream_writes(embedded, documents, checkpoint=path, layers=[1], **options)


@pytest.mark.fault(28)
def test_a_file_that_has_changed_is_refused(embedded, tmp_path):
    source, path = tmp_path / "corpus.txt", tmp_path / "run"
    source.write_text("I believe\nWe think\n")
    ms.stream_writes(embedded, source, checkpoint=path)
    source.write_text("I believe\nWe think that\n")
    with pytest.raises(ValueError, match="The first 2 documents are not those"):
        ms.stream_writes(embedded, source, checkpoint=path)
    source.write_text("I believe\nWe drink\n")
    with pytest.raises(ValueError, match="The first 2 documents are not those"):
        ms.stream_writes(embedded, source, checkpoint=path)


def test_free_memory_does_not_change_the_passes_of_a_run_that_goes_on(
    embedded, tmp_path, monkeypatch
):
    def stop():
        yield from texts(6)
        raise KeyboardInterrupt

    monkeypatch.setattr(stream_file, "WINDOW", 100)
    with pytest.raises(KeyboardInterrupt):
        ms.stream_writes(embedded, stop(), checkpoint=tmp_path / "run")
    before = ms.Checkpoint.load(tmp_path / "run").state.tokens_per_pass
    monkeypatch.setattr("mechsvd.engine.batches.free_bytes", lambda device: 10**6)
    assert ms.stream_writes(embedded, texts(6)).tokens_per_pass == 256 < before
    resumed = ms.stream_writes(embedded, texts(6), checkpoint=tmp_path / "run")
    assert resumed.tokens_per_pass == before


# It loads the model once and then forks, so that many runs can be started and killed in a short time.
SERVER = """
import os, random, signal, sys, time
import torch
import mechsvd as ms
from mechsvd.engine import stream
from tests.test_stream import texts

folder, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
stream.WINDOW = 200
model, documents, rng = ms.load_model(), texts(30), random.Random()
ms.self_check(model)


def begin(name):
    child = os.fork()
    if child == 0:
        path = f"{folder}/{name}"
        ms.stream_writes(model, documents, context=64, checkpoint=path, progress=False)
        os._exit(0)
    return child


started = time.monotonic()
assert os.waitpid(begin("whole"), 0)[1] == 0
seconds, killed, reached = time.monotonic() - started, 0, []
while killed < kills:
    child = begin("killed")
    time.sleep(rng.uniform(0, seconds / 2))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if os.path.exists(f"{folder}/killed"):
        reached.append(ms.Checkpoint.load(f"{folder}/killed").state.documents)
        if reached[-1] == len(documents):
            break
assert os.waitpid(begin("killed"), 0)[1] == 0
print(killed, reached)
"""


@pytest.mark.fault(27)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no SIGKILL and no fork")
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    root = Path(__file__).parents[1]
    server = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path), "3"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "TOKENIZERS_PARALLELISM": "false"},
    )
    assert server.returncode == 0, server.stderr
    whole, killed = (ms.Checkpoint.load(tmp_path / name) for name in ("whole", "killed"))
    assert whole.is_finished
    assert killed.is_finished
    assert same(killed.state, whole.state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.fault(29, 30)
def test_a_checkpoint_behind_a_link_is_locked_and_stays_a_link(embedded, tmp_path):
    (tmp_path / "disk").mkdir()
    real, link, folder = tmp_path / "disk" / "run", tmp_path / "link", tmp_path / "folder"
    link.symlink_to(real)
    folder.symlink_to(tmp_path / "disk")
    ms.stream_writes(embedded, texts(2), layers=[0], checkpoint=link)
    assert link.is_symlink()
    assert real.is_file()
    assert not real.is_symlink()
    for held, other in ((real, link), (link, real), (link, folder / "run"), (folder / "run", real)):
        with (
            open_checkpoint(held),
            pytest.raises(RuntimeError, match="is in use by another run"),
            open_checkpoint(other),
        ):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link", "folder"}


@pytest.mark.fault(30)
def test_results_and_folded_models_behind_a_link_stay_behind_it(embedded, meaning_svd, tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("svd", "model", "round"):
        (tmp_path / name).symlink_to(tmp_path / ("round" if name == "round" else f"disk/{name}"))
    for _ in range(2):
        meaning_svd.save(tmp_path / "svd")
        ms.fold(embedded, ms.keep(meaning_svd, 3), tmp_path / "model", layers=[0])
    assert all((tmp_path / name).is_symlink() for name in ("svd", "model"))
    assert ms.load(tmp_path / "disk" / "svd").rank == 128
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"svd", "model"}
    with pytest.raises((ValueError, OSError), match="round"):
        meaning_svd.save(tmp_path / "round")
