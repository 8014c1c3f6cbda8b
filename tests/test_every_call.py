"""What every call that runs a model does with a fault: refused at the door, or nothing is left behind."""

import functools
import pickle
import random
import re
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from torch.nn import functional

import mechsvd as ms
from mechsvd.engine.checkpoint import describe, open_checkpoint
from mechsvd.engine.resuming import describe_value
from mechsvd.model.identity import fingerprint
from tests.calls import CALLS, earlier, running, small
from tests.conftest import tiny, tiny_task
from tests.test_fields import SOURCE

pytestmark = pytest.mark.filterwarnings("ignore")
ONE_TEXT = {"donor_baseline", "generate", "generate_tasks", "sweep_adaptively"}
ONLY_TOKENS = {"generate", "generate_tasks"}  # go on from them; need no task
OF_A_RUN = {"refine_ranking"}  # takes the texts of its estimate, which was refused then
NO_DIRECTIONS = {  # of the user's
    "collect_writes", "stream_writes", "donor_baseline", "collect_reads", "read_write_angles",
    "compare_orders", "fit_and_measure", "overlap_anchors", "compare_with_random_texts",
    "compare_with_literature", "contrast", "contrast_sweep",
}  # fmt: skip


def test_the_table_has_every_call_that_runs_a_model():
    assert set(CALLS) == running()


def refusals(message, error, tasks=None, svd=None, but=(), model=None, **options):
    """What the calls do instead of refusing in these words."""
    _, texts, own = small()
    model = model or small()[0]
    wrong = {}
    for name in sorted(set(CALLS) - set(but)):
        try:
            CALLS[name](model, texts if tasks is None else tasks, svd or own, **options)
            wrong[name] = "no error"
        except Exception as raised:
            words = str(raised.args[0])
            if not isinstance(raised, error) or not re.search(message, words):
                wrong[name] = f"{type(raised).__name__}: {words[:200]}"
    return wrong


@pytest.mark.fault(6)
def test_an_empty_list_of_texts_is_refused():
    assert not refusals(
        "list is empty|no texts|needs? at least|at least two|takes two",
        ValueError,
        [],
        but=ONE_TEXT,
    )


@pytest.mark.fault(7)
def test_a_text_longer_than_the_context_is_refused_with_both_lengths():
    long = [tiny_task(65, seed=seed) for seed in range(4)]
    words = "has 65 tokens, but the model's context holds 64; shorten it"
    assert not refusals(words, ValueError, long, but={"stream_writes", *ONLY_TOKENS, *OF_A_RUN})


@pytest.mark.fault(11)
def test_token_ids_that_the_model_does_not_have_are_refused():
    foreign = [ms.Task(torch.tensor([0, 9, 300, seed]), 1) for seed in range(4)]
    assert not refusals(
        "Token ids run from 0 to 300, but the model has 0 to 255", ValueError, foreign, but=OF_A_RUN
    )


@pytest.mark.fault(13)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    assert not refusals(r"No layers \[2\]: the model has layers 0–1", KeyError, layers=[2])


@pytest.mark.fault(14)
def test_a_layer_without_its_hook_is_refused_with_the_way_on():
    words = "`missing=.skip.`"
    assert not refusals(words, KeyError, model=tiny("Lfm2"))


@pytest.mark.fault(10)
@pytest.mark.parametrize("start", [[5, 9], [0, 0]])
def test_no_bos_and_two_are_warned_of(start):
    texts = [ms.Task(torch.tensor([*start, *range(7 + n, 12 + n)]), 3) for n in range(4)]
    silent = []
    for name in sorted(set(CALLS) - OF_A_RUN):
        with warnings.catch_warnings(record=True) as said, linear_maps(stop=1):
            warnings.simplefilter("always")
            with suppress(KeyboardInterrupt):
                CALLS[name](small()[0], texts, small()[2])
        silent += [] if any("BOS" in str(warning.message) for warning in said) else [name]
    assert not silent


@pytest.mark.fault(5)
def test_no_position_at_all_is_refused():
    assert not refusals("positions", ValueError, positions=[], but={"fold"})


@pytest.mark.fault(16)
def test_a_model_that_writes_where_no_hook_sees_it_is_refused_with_the_block():
    layer = small()[0].original_model.model.layers[1]
    handle = layer.register_forward_hook(
        lambda m, args, out: 2 * out if isinstance(out, torch.Tensor) else (2 * out[0], *out[1:])
    )
    try:
        assert not refusals(r"cannot use this model: .*block 1.*\d", ValueError)
    finally:
        handle.remove()


@pytest.mark.fault(18)
def test_directions_of_another_model_are_refused():
    model, texts, _ = small()
    other = ms.reinitialised(model, 1)
    svd = ms.decompose(ms.collect_writes(other, texts))
    assert not refusals(
        "come from different models.*weights: ", ValueError, svd=svd, but=NO_DIRECTIONS
    )


@pytest.mark.fault(28)
def test_the_checkpoint_of_another_call_is_refused(tmp_path):
    with open_checkpoint(tmp_path / "run") as file:
        file.resume(describe("count", {"n": 3}, SOURCE))
        file.save(ms.Subspace(torch.eye(3)))
    assert not refusals(
        "checkpoint of another call: .*but was `count`", ValueError, checkpoint=tmp_path / "run"
    )


@pytest.mark.fault(29)
def test_a_checkpoint_that_another_run_holds_is_refused(tmp_path):
    with open_checkpoint(tmp_path / "run"):
        assert not refusals("in use by another run", RuntimeError, checkpoint=tmp_path / "run")


@pytest.mark.fault(30)
def test_a_checkpoint_without_a_folder_is_refused(tmp_path):
    path = tmp_path / "none" / "run"
    assert not refusals(
        "folder .*none does not exist; create it first", FileNotFoundError, checkpoint=path
    )


@functools.cache
def uninterrupted(name):
    """What a call gives, and the rows of each linear map that the model runs for it."""
    earlier()
    with linear_maps() as seen:
        return CALLS[name](*small()), seen


@pytest.mark.fault(58)
@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_gives_can_go_to_another_process(name):
    result, _ = uninterrupted(name)
    assert describe_value(pickle.loads(pickle.dumps(result))) == describe_value(result)


@contextmanager
def linear_maps(stop=None, most_rows=None, times=None):
    """See every linear map that runs: stop at one of them, or let memory run out at many rows."""
    linear, seen, failed = functional.linear, [], []

    def seeing(x, *args):
        seen.append(x.shape[0] if x.ndim == 3 else 1)
        if len(seen) == stop:
            raise KeyboardInterrupt
        if most_rows is not None and seen[-1] > most_rows and len(failed) != times:
            failed.append(1)
            raise torch.OutOfMemoryError("Tried to allocate 20 GiB")
        return linear(x, *args)

    functional.linear = seeing
    try:
        yield seen
    finally:
        functional.linear = linear


def state_of(model):
    """All that a call must leave as it was."""
    modules = [*model.modules(), *model.original_model.modules()]
    return (
        fingerprint(model),
        model.cfg.dtype,
        model.original_model.config._attn_implementation,
        torch.is_grad_enabled(),
        [p.requires_grad for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        [(len(p.fwd_hooks), len(p.bwd_hooks)) for p in model.hook_dict.values()],
        [("forward" in vars(m)) for m in modules],
    )


def alike(first, second, **tolerance):
    """Whether two results are the same in all fields but their source."""
    if isinstance(first, torch.Tensor):
        exact = {"rtol": 0, "atol": 0}
        return torch.allclose(first, second, equal_nan=True, **(tolerance or exact))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(
            alike(a, b, **tolerance) for a, b in zip(first, second, strict=True)
        )
    if hasattr(first, "__dataclass_fields__"):
        return type(first) is type(second) and all(
            alike(getattr(first, n), getattr(second, n), **tolerance)
            for n in first.__dataclass_fields__
            if n not in ("source", "files", "sha256")
        )
    if isinstance(first, float):
        return first == second or bool(
            np.isclose(first, second, **(tolerance or {"rtol": 0, "atol": 0}), equal_nan=True)
        )
    return first == second


@pytest.fixture
def in_training():
    """The small model in train mode, with dropout."""
    model = small()[0]
    attention = [layer.self_attn for layer in model.original_model.model.layers]
    for one in attention:
        one.attention_dropout = 0.5
    model.train()
    yield model
    model.eval()
    for one in attention:
        one.attention_dropout = 0.0


@pytest.mark.fault(22, 24, 27)
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_leaves_the_model_as_it_was_and_the_same_call_goes_on(name, tmp_path, in_training):
    in_training.eval()
    whole, maps = uninterrupted(name)
    in_training.train()
    before, options = state_of(in_training), {"checkpoint": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt), linear_maps(random.Random(name).randint(1, len(maps))):
        CALLS[name](*small(), **options)
    assert state_of(in_training) == before
    with pytest.warns(
        UserWarning, match="The model is in train mode: it is evaluated in eval mode"
    ):
        resumed = CALLS[name](*small(), **options)
    assert alike(resumed, whole)
    assert state_of(in_training) == before


@pytest.mark.fault(23, 41)
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"fold"}))  # which refuses them
def test_beside_a_hook_of_the_user_every_row_runs_alone_and_the_hook_stays(name):
    model = small()[0]
    earlier()

    def first_row(x, hook):
        x[0] *= 0.5

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", first_row)]):
        before = state_of(model)
        with (
            pytest.warns(
                UserWarning, match=r"already has hooks at blocks\.0\.hook_resid_pre; they"
            ),
            linear_maps(stop=150) as seen,  # some passes, not all: one row per pass is slow
            suppress(KeyboardInterrupt),
        ):
            CALLS[name](*small())
        assert set(seen) == {1}
        assert state_of(model) == before


@pytest.mark.fault(26)
@pytest.mark.parametrize("name", CALLS)
def test_when_memory_runs_out_once_the_call_goes_on_with_fewer_rows(name):
    whole, maps = uninterrupted(name)
    if max(maps) == 1:
        return  # one row per pass is all that it runs
    # its steps are the signs of slopes, some of which are near 0
    loose = (
        {"rtol": 1e-2, "atol": 1e-2} if name == "learn_subspace" else {"rtol": 1e-3, "atol": 1e-4}
    )
    with linear_maps(most_rows=1, times=1):
        assert alike(CALLS[name](*small()), whole, **loose)


@pytest.mark.fault(26)
def test_where_one_row_does_not_fit_the_error_says_how_much_it_needs():
    earlier()
    with linear_maps(most_rows=0):
        assert not refusals(
            "MiB are needed next to the model|Memory ran out in `.*smaller dtype", MemoryError
        )


@pytest.mark.fault(45)
@pytest.mark.parametrize("name", sorted(set(CALLS) - ONE_TEXT))
def test_texts_may_come_from_a_generator(name):
    model, texts, svd = small()
    assert alike(CALLS[name](model, (text for text in texts), svd), uninterrupted(name)[0])
