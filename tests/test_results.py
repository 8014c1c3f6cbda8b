import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import mechsvd as ms
from mechsvd.results import Provenance, require_same_model, write_atomically
from tests.conftest import finishes


def same(first, second):
    """Compare two results field by field."""
    if isinstance(first, torch.Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        return alike and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(
            same(a, b) for a, b in zip(first, second, strict=True)
        )
    if hasattr(first, "__dataclass_fields__"):
        return type(first) is type(second) and all(
            same(getattr(first, n), getattr(second, n)) for n in first.__dataclass_fields__
        )
    return first == second


@pytest.fixture(scope="module")
def results(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[0, 5])
    writes = ms.collect_writes(embedded, meaning)
    return [
        meaning,
        writes,
        meaning_svd,
        meaning_svd.subspace(3),
        sweep,
        sweep.measurement,
        ms.self_check(embedded),
    ]


def test_every_result_comes_back_as_it_was_saved(results, tmp_path):
    for result in results:
        path = tmp_path / f"{type(result).__name__}.safetensors"
        result.save(path)
        assert same(type(result).load(path), result)


def test_every_result_prints_itself_in_three_lines(results):
    for result in results:
        assert len(repr(result).splitlines()) == 3, repr(result)


def test_results_of_sub_results_know_their_model(results):
    assert all(r.source.model == "mechsvd embedded" for r in results if hasattr(r, "source"))


@pytest.fixture
def saved(results, tmp_path):
    path = tmp_path / "sweep.safetensors"
    results[4].save(path)
    return path


@pytest.mark.fault(31)
def test_a_truncated_file_is_refused_by_name(saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(
        ValueError,
        match=r"sweep.safetensors is truncated or not a safetensors file.*Nothing was loaded",
    ):
        ms.RankSweep.load(saved)


@pytest.mark.fault(31)
def test_garbage_and_an_empty_file_are_refused(saved):
    for content in (b"", b"garbage", os.urandom(4000)):
        saved.write_bytes(content)
        with pytest.raises(ValueError, match=r"sweep\.safetensors"):
            ms.RankSweep.load(saved)


@pytest.mark.fault(31)
def test_one_flipped_bit_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its contents do not match the SHA-256"):
        ms.RankSweep.load(saved)


def test_another_document_under_the_same_tensors_is_noticed(saved, results):
    content = saved.read_bytes()
    saved.write_bytes(content.replace(b"mechsvd embedded", b"mechsvd embroils"))
    with pytest.raises(ValueError, match="damaged: its contents do not match the SHA-256"):
        ms.RankSweep.load(saved)


def test_a_file_of_any_size_of_header_is_read(tmp_path):
    """Headers of 640, 896, 1152 and 1408 bytes begin like pickles, one of 19280 like an archive."""
    tokens = torch.tensor([0, 5])
    for extra in (*range(0, 1400, 8), *range(18800, 19000, 8)):
        task = ms.Task(tokens, 1, ("a" * extra, "b"))
        task.save(tmp_path / "task.safetensors")
        assert ms.Task.load(tmp_path / "task.safetensors").pieces == task.pieces


@pytest.mark.fault(32)
def test_pickles_are_never_opened(tmp_path):
    path = tmp_path / "result.pt"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(
        ValueError, match=r"looks like a pickle, \.pt or \.npy file, which mechsvd never opens"
    ):
        ms.RankSweep.load(path)


def test_a_foreign_safetensors_file_another_class_and_a_missing_file_are_refused(saved, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not a result of mechsvd"):
        ms.RankSweep.load(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"holds a RankSweep, not a Writes; call RankSweep\.load"):
        ms.Writes.load(saved)
    with pytest.raises(FileNotFoundError, match=r"No file .*nowhere"):
        ms.Writes.load(tmp_path / "nowhere")


@pytest.mark.fault(33)
def test_a_newer_format_says_which_version_wrote_it(saved):
    header = json.loads(
        saved.read_bytes()[8 : 8 + int.from_bytes(saved.read_bytes()[:8], "little")]
    )["__metadata__"]
    save_file(load_file(saved), saved, metadata={**header, "format": "2", "version": "9.9.9"})
    with pytest.raises(
        ValueError, match=r"written by mechsvd 9\.9\.9 in format 2, .* update mechsvd"
    ):
        ms.RankSweep.load(saved)


@pytest.mark.fault(30)
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.fault(30)
def test_a_full_disk_leaves_the_saved_result_whole_and_no_other_file(saved, results):
    resource = pytest.importorskip("resource")  # not on Windows
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{saved}'"):
            results[4].save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.fault(30, 31)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes a fork")
def test_a_save_that_is_killed_at_any_step_leaves_the_old_result_whole_or_the_new_one(tmp_path):
    path, event, was_done = tmp_path / "kept", 0, False
    old, new = (ms.Subspace(torch.eye(3)[:, :rank]) for rank in (1, 2))
    while not was_done:
        old.save(path)
        was_done = finishes(partial(new.save, path), event, {"open", "os.chmod", "os.rename"})
        assert ms.Subspace.load(path).rank in ((2,) if was_done else (1, 2))
        event += 1
    assert event > 3


@pytest.mark.fault(30)
def test_a_missing_folder_is_named(results, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"the folder .*nowhere does not exist; create it first"
    ):
        results[2].save(tmp_path / "nowhere" / "svd.safetensors")


@pytest.mark.fault(25)
def test_results_of_different_models_or_states_are_not_combined():
    facts = {
        "model": "a",
        "weights": "1",
        "processing": "raw",
        "dtype": "float32",
        "transformer_lens": "4",
        "mechsvd": "0",
    }
    first = Provenance(**facts)
    require_same_model(
        first,
        Provenance(**{**facts, "model": "the same under another name", "transformer_lens": "3.9"}),
        "They",
    )
    require_same_model(first, None, "They")
    for change in ({"weights": "2"}, {"processing": "normalization folded"}, {"dtype": "bfloat16"}):
        with pytest.raises(
            ValueError,
            match=f"They come from different models or processing states: {next(iter(change))}",
        ):
            require_same_model(first, Provenance(**{**facts, **change}), "They")


def test_directions_of_a_fine_tune_pass_as_the_refusal_says(embedded, meaning, meaning_svd):
    foreign = replace(meaning_svd, source=replace(meaning_svd.source, weights="of a fine-tune"))
    with pytest.raises(ValueError, match="as a model and its fine-tune may, `same_model=False`"):
        ms.sweep_rank(embedded, meaning, foreign, [3])
    expected = ms.sweep_rank(embedded, meaning, meaning_svd, [3]).measurement.log_prob
    found = ms.sweep_rank(embedded, meaning, foreign, [3], same_model=False)
    assert torch.equal(found.measurement.log_prob, expected)
    without = replace(foreign.subspace(3), source=None)  # and as bare directions
    assert torch.allclose(
        ms.measure(embedded, meaning, [ms.keep(without)]).log_prob, expected, atol=1e-4
    )
