"""The modes of torch that a caller may be in, functions that write to what they are given, and threads: no number changes."""

import inspect
import pickle
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mechsvd as ms
from mechsvd import ambient
from mechsvd.ambient import _settings, plain_torch
from mechsvd.engine.resuming import describe_value
from mechsvd.model.evaluation import alone
from tests.conftest import load_real, tiny, tiny_task


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        return given * 2 if getattr(function, "__name__", "") in ("linear", "matmul") else given


class Noisy(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        return given + 1 if "mm" in function.__name__ else given


@contextmanager
def setting(write, value, before):
    write(value)
    try:
        yield
    finally:
        write(before)


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def lossy(place):
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    return setting(lambda value: write(*place, value), "bf16", read(*place))


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "gradients off": lambda: setting(torch.set_grad_enabled, False, True),
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "float64 by default": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16 by default": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta by default": lambda: setting(torch.set_default_device, "meta", None),
    "the meta device": lambda: torch.device("meta"),
    "cpu by default": lambda: setting(torch.set_default_device, "cpu", None),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "medium products": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "bfloat16 products": lambda: lossy(("mkldnn", "matmul")),
    "no oneDNN": lambda: setting(torch._C._set_mkldnn_enabled, False, True),
    "denormals flushed": lambda: setting(torch.set_flush_denormal, True, False),
    "two threads": lambda: setting(torch.set_num_threads, 2, torch.get_num_threads()),
    "rounded for the backward pass": lambda: saved_tensors_hooks(
        lambda x: x.bfloat16() if x.is_floating_point() else x, lambda x: x.float()
    ),
    "saved on the cpu": save_on_cpu,
    "fake tensors": fake,
    "a mode of functions": Doubling,
    "a mode of kernels": Noisy,
    "flash attention alone": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "cudnn attention alone": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "no plain attention": lambda: setting(torch.backends.cuda.enable_math_sdp, False, True),
    "a seed": lambda: setting(torch.manual_seed, 7, 8),
    "a fork of the seeds": torch.random.fork_rng,
    "NumPy's errors": lambda: np.errstate(all="raise"),
    "a dual level": torch.autograd.forward_ad.dual_level,
    "autograd on one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "no hooks on saved tensors": lambda: torch.autograd.graph.disable_saved_tensors_hooks("no"),
    "two at once": lambda: both(torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)),
}
if not hasattr(torch._C, "_get_fp32_precision_getter"):
    del MODES["bfloat16 products"]


@contextmanager
def both(*modes):
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


def small():
    real = load_real("embedded")
    return real.model, real.task, real.svd


def calls():
    """Each call as a function that gives one tensor."""
    model, task, svd = small()
    vectors = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([3.0, 2.0], dtype=torch.float64)
    quiet = {"progress": False}
    return {
        "measure": lambda: (
            ms.measure(
                model,
                task,
                [ms.keep(svd, 8), lambda x, hook: 0.5 * x],
                metric=ms.kl_divergence,
                **quiet,
            ).value
        ),
        "sweep_rank": lambda: ms.sweep_rank(model, task, svd, [0, 9, 128]).measurement.log_prob,
        "decompose": lambda: ms.decompose(ms.collect_writes(model, task, **quiet)).singular_values,
        "generate": lambda: (
            ms.generate_tasks(
                model, "I believe", [None, ms.keep(svd, 64)], max_new_tokens=6, **quiet
            )[1].tokens
        ),
        "sampled": lambda: (
            ms.generate_tasks(
                model, "I believe", [None], max_new_tokens=6, temperature=1.0, seed=3, **quiet
            )[0].tokens
        ),
        "hessian_attribution": lambda: (
            ms.hessian_attribution(
                model,
                task,
                [ms.find_sites(model)[3]],
                pairs=2,
                path_steps=4,
                positions=[3],
                **quiet,
            ).quadratic
        ),
        "a function": lambda: ms.hessian_attribution_of(torch.prod, w).quadratic,
        "rank_directions": lambda: (
            ms.rank_directions(
                model, task, ms.decompose(ms.collect_writes(model, task, layers=[0])), layers=[0]
            ).effect
        ),
        "stream_writes": lambda: (
            ms.stream_writes(model, ["I believe it."], **quiet).decompose().singular_values
        ),
        "Task.from_text": lambda: ms.Task.from_text(model, "We think", max_new_tokens=5).tokens,
        "tasks_from": lambda: ms.tasks_from(model, ["We think so."])[0].tokens,
        "self_check": lambda: ms.self_check(model).block_error,
        "overlap": lambda: ms.overlap([svd.subspace(8), svd.subspace(16)]).values,
        "principal_angles": lambda: ms.principal_angles(svd.subspace(8), svd.subspace([2, 30])),
        "random_subspace": lambda: ms.random_subspace(8, 3, seed=1).basis,
        "span": lambda: ms.span(vectors).basis,
    }


def checked(call, name, expected):
    """What differs from the right value; nothing for a refusal in our words."""
    try:
        found = call()
    except (RuntimeError, ValueError, TypeError) as error:
        return None if str(error).startswith("mechsvd cannot") else f"{name}: {error!r:.200}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{name}: {found.dtype} {[*found.shape]}"
    with plain_torch():
        close = torch.allclose(found.double(), expected.double(), rtol=2e-4, atol=2e-4)
    return None if close else f"{name}: {found} and not {expected}"


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert ambient._SETTINGS._calls == ambient._SETTINGS._unfused == 0


@pytest.fixture(scope="module")
def right():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: call() for name, call in calls().items()}


def state():
    backends = torch.backends.cuda
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_anomaly_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        ["ieee" if (now := read()) == "none" else now for read, _, _ in _settings()],
        (backends.flash_sdp_enabled(), backends.math_sdp_enabled()),
        np.geterr(),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fault(58)
def test_a_mode_of_the_caller_changes_no_number_and_is_there_afterwards(mode, right, silent):
    given, outside = calls(), state()
    with MODES[mode]():
        before = state()
        wrong = [checked(given[name], name, expected) for name, expected in right.items()]
        assert state() == before
    assert state() == outside
    assert not list(filter(None, wrong))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, torch.func.jacfwd])
@pytest.mark.fault(58)
def test_a_transform_of_functions_is_refused_in_a_sentence(transform):
    x, new = torch.ones(2) if transform is torch.vmap else torch.tensor(1.0), tiny("Llama")
    names = ("measure", "sweep_rank", "generate", "hessian_attribution", "Task.from_text")
    own = [*map(calls().get, names), lambda: ms.self_check(new).block_error]
    for call in own:
        with pytest.raises(RuntimeError, match="cannot run a model inside a transform"):
            transform(lambda x, call=call: x * call().sum())(x)


@pytest.mark.fault(58)
def test_gates_are_exact_in_a_run_of_the_users_own_under_autocast(real):
    x = torch.randn(1, 5, real.d_model, generator=torch.Generator().manual_seed(0))
    edit = ms.keep(real.svd, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = edit(x)
    torch.testing.assert_close(inside, edit(x), rtol=0, atol=0)


# Functions that write to what they are given


def times(x, hook=None):
    x.mul_(0.5)
    return x


def data(x, hook=None):
    x.data.mul_(0.5)
    return x


def detached_out(x, hook=None):
    torch.mul(x.detach(), 0.5, out=x.detach())
    return x


def array(x, hook=None):
    x.numpy()[:] *= 0.5
    return x


def dlpack(x, hook=None):
    np.from_dlpack(x.detach()).__imul__(np.float32(0.5))
    return x


def storage(x, hook=None):
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    whole.data.mul_(0.5)
    return x


def counter_put_back(x, hook=None):
    with torch.autograd._unsafe_preserve_version_counter(x):
        x.mul_(0.5)
    return x


def under_inference(x, hook=None):
    with torch.inference_mode():
        x.data.mul_(0.5)
    return x


def new_after_writing(x, hook=None):
    half = 0.5 * x
    x.data.zero_()
    return half


WRITING = [data, array, dlpack, storage, counter_put_back, under_inference]
WRITING += [new_after_writing]


def halved(model, task, **options):
    return ms.measure(model, task, [lambda x, hook: 0.5 * x], progress=False, **options)


@pytest.mark.parametrize("edit", WRITING)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.fault(58)
def test_an_edit_that_writes_to_its_input_changes_nothing_else(real, edit, mode):
    model, task, svd = real.model, real.task, real.svd
    right, kept = halved(model, task), ms.measure(model, task, [ms.keep(svd, 9)], progress=False)
    stacks = {
        "alone": [edit],
        "before": [edit, ms.keep(svd, 9)],
        "after": [ms.keep(svd, 9), edit],
        "twice": [edit, edit, ms.keep(svd, 9)],
        "in a chain": [ms.chain(edit), ms.chain(edit, ms.chain()), ms.keep(svd, 9)],
    }
    for edits in stacks.values():
        for size in (None, 1, 2):
            with mode():
                found = ms.measure(model, task, edits, batch_size=size, progress=False)
            torch.testing.assert_close(
                found.clean_run.log_prob, right.clean_run.log_prob, atol=2e-4, rtol=0
            )
            for one, value, delta in zip(edits, found.log_prob, found.orig_deltas, strict=True):
                own = kept if isinstance(one, type(ms.keep(svd, 9))) else right
                torch.testing.assert_close(value, own.log_prob[0], atol=2e-4, rtol=0)
                torch.testing.assert_close(delta, own.orig_deltas[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("edit", WRITING)
@pytest.mark.fault(58)
def test_it_changes_nothing_else_among_texts_and_at_some_positions_and_in_texts(real, edit):
    model, task = real.model, real.task
    other = ms.Task(task.tokens.flip(0).clamp(min=3), task.prompt_length)
    for options in ({}, {"positions": [4, 5]}, {"layers": [1]}):
        right = halved(model, [task, other], **options)
        found = ms.measure(model, [task, other], [edit], progress=False, **options)
        torch.testing.assert_close(found.value, right.value, atol=2e-4, rtol=0)
    hooks = ms.fwd_hooks(model, edit, layers=[0])
    plain_hooks = ms.fwd_hooks(model, lambda x, hook: 0.5 * x, layers=[0])
    with torch.no_grad():
        torch.testing.assert_close(
            model.run_with_hooks(task.tokens[None], fwd_hooks=hooks),
            model.run_with_hooks(task.tokens[None], fwd_hooks=plain_hooks),
        )
    written = [
        ms.generate(model, real.prompt, [one, None], max_new_tokens=5, progress=False)
        for one in (edit, lambda x, hook: 0.5 * x)
    ]
    assert written[0] == written[1]


@pytest.mark.fault(58)
def test_an_edit_in_place_that_torch_notices_is_refused_in_every_mode(real):
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for edits in ([times], [ms.chain(times)], [ms.chain(), times], [detached_out]):
            with mode(), pytest.raises(ValueError, match="layer 0 attn changed its input in place"):
                ms.measure(real.model, real.task, edits, progress=False)


def writing_metric(write):
    def metric(logits, clean, task):
        value = logits.sum((1, 2)) - clean.sum()
        write(logits), write(clean)
        return value

    return metric


@pytest.mark.parametrize("write", ["tokens", "continuation", "array"])
@pytest.mark.fault(58)
def test_a_metric_that_writes_to_the_tokens_of_its_task_is_refused_and_the_task_stays(real, write):
    before = real.task.tokens.clone()

    def metric(logits, clean, task):
        labels = task.tokens.numpy() if write == "array" else getattr(task, write)
        labels[: task.prompt_length] = -100  # as labels are often made
        return logits.sum((1, 2))

    with pytest.raises(ValueError, match="changed the task's tokens in place"):
        ms.measure(real.model, real.task, [ms.keep(real.svd, 3)], metric=metric, progress=False)
    assert torch.equal(real.task.tokens, before)


@pytest.mark.parametrize("write", [data, array, storage, counter_put_back])
@pytest.mark.fault(58)
def test_a_metric_that_writes_to_its_logits_changes_nothing_else(real, write):
    model, svd = real.model, real.svd
    tasks = [real.task, ms.Task(real.task.tokens.flip(0).clamp(min=3), real.task.prompt_length)]
    edits = [ms.keep(svd, k) for k in (3, 9, 20)]

    def total(logits, clean, task):
        return logits.sum((1, 2)) - clean.sum()

    right = ms.measure(model, tasks, edits, metric=total, progress=False)
    for size in (None, 1, 2):
        with torch.inference_mode():
            found = ms.measure(
                model,
                tasks,
                edits,
                metric=ms.Metric("own", "", writing_metric(write), profile=profile(write)),
                batch_size=size,
                progress=False,
            )
        torch.testing.assert_close(found.value, right.value, rtol=1e-4, atol=0.5)
        for mine, its in zip(found.parts, right.parts, strict=True):
            for name in ("log_prob", "kl_divergence", "orig_deltas"):
                torch.testing.assert_close(
                    getattr(mine, name), getattr(its, name), atol=2e-4, rtol=1e-4
                )


def profile(write):
    def zeroed(edited, clean):
        write(edited), write(clean)
        return edited[:, 0, :2]

    return zeroed


@pytest.mark.fault(58)
def test_criteria_and_functions_that_write_to_what_they_get_change_no_result(real):
    def criterion(measured):
        margins = measured.log_prob - measured.clean_run.log_prob + 1.0
        measured.log_probs.data.zero_()
        measured.clean_run.log_probs.zero_()
        return margins

    right = ms.critical_rank(real.model, real.task, real.svd, 1.0, progress=False)
    found = ms.critical_rank(real.model, real.task, real.svd, criterion=criterion, progress=False)
    assert found.rank == right.rank
    torch.testing.assert_close(found.sweep.measurement.log_prob, right.sweep.measurement.log_prob)

    def product(w):
        value = w.clone().prod()
        w.data.zero_()
        return value

    w = torch.tensor([3.0, 2.0]).double()
    value = ms.hessian_attribution_of(product, w).quadratic
    torch.testing.assert_close(value, torch.tensor([6.25, -0.25]).double())
    assert w.tolist() == [3, 2]


# Threads


def in_threads(count, *functions):
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(lambda f=f: [f() for _ in range(count)]) for f in functions]
        return [future.result() for future in futures]


def hooks_on(model):
    return sum(bool(point.fwd_hooks) for point in set(model.hook_dict.values()))


@pytest.mark.fault(58)
def test_threads_on_one_model_get_what_each_gets_alone(real):
    model, task, svd = real.model, real.task, real.svd
    own = [
        lambda: ms.generate(model, real.prompt, ms.keep(svd, 20), max_new_tokens=5),
        lambda: ms.generate(
            model, real.prompt, ms.keep(svd, 40), max_new_tokens=5, temperature=1.0, seed=2
        ),
        lambda: ms.measure(model, task, [ms.keep(svd, 9)]).log_prob.item(),
        lambda: ms.collect_writes(model, task).values.sum().item(),
        lambda: ms.Task.from_text(model, real.prompt, max_new_tokens=5).tokens.tolist(),
        lambda: ms.stream_writes(model, [real.prompt] * 2).decompose().singular_values[0].item(),
        lambda: (
            ms.hessian_attribution(
                model, task, [ms.find_sites(model)[3]], pairs=1, path_steps=2, positions=[3]
            )
            .quadratic[0]
            .item()
        ),
    ]
    alone = [f() for f in own]
    for right, found in zip(alone, in_threads(3, *own), strict=True):
        assert found == [pytest.approx(right, rel=1e-6)] * 3 if type(right) is float else found
        assert type(right) is float or found == [right] * 3
    assert hooks_on(model) == 0
    assert not model.training


@pytest.mark.fault(58)
def test_threads_that_meet_a_model_first_check_it_once_each_right():
    right = ms.self_check(tiny("GPT-2"))
    model = tiny("GPT-2")
    for (check,) in in_threads(1, *[lambda: ms.self_check(model)] * 4):
        torch.testing.assert_close(check.block_error, right.block_error)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.fault(58)
def test_an_exception_lets_the_next_thread_in(error):
    model, task = tiny("Llama"), tiny_task()

    def failing(x, hook):
        raise error("stop")

    with pytest.raises(error):
        ms.measure(model, task, [failing])
    assert in_threads(1, lambda: len(ms.measure(model, task, [ms.chain()]))) == [[1]]
    assert hooks_on(model) == 0


@pytest.mark.fault(58)
def test_two_bridges_of_one_model_share_its_lock_and_a_thread_may_enter_twice():
    hf_model, entered = tiny("Llama").original_model, threading.Event()
    first, second = (type("Bridge", (), {"original_model": hf_model})() for _ in range(2))

    def enter():
        with alone(second):
            entered.set()

    with alone(first), alone(first):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(5)
    assert entered.is_set()


@pytest.mark.fault(58)
def test_settings_are_put_back_when_the_last_of_several_threads_is_done():
    inside, go = threading.Event(), threading.Event()

    def stay():
        with plain_torch():
            inside.set()
            go.wait(5)
        return torch.get_default_dtype()

    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(stay)
            assert inside.wait(5)
            with plain_torch():
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float32  # the other is still in its call
            go.set()
            assert waiting.result() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# Processes


def movable():
    """What is made by public calls and may go to another process, but for what calls return."""
    _, task, svd = small()
    writes = ms.collect_writes(load_real("embedded").model, task)
    sub, layers = svd.subspace(4), ms.decompose(writes, per_layer=True)
    gates = {
        "keep": ms.keep(sub),
        "ablate": ms.ablate(sub, baseline=ms.mean_baseline(writes)),
        "gate": ms.gate(svd, torch.linspace(0, 1, svd.rank)),
        "stack": ms.gate(svd, torch.linspace(0, 1, 3 * svd.rank).reshape(3, -1)),
        "shrink": ms.shrink(svd, 2.0),
        "per layer": ms.keep(layers, 3),
        "shift": ms.shift(torch.ones(svd.d_model)),
        "chain": ms.chain(ms.keep(sub), ms.shift(torch.ones(svd.d_model))),
    }
    metrics = [ms.log_prob, ms.kl_divergence, ms.absolute_change, ms.cross_entropy, ms.greedy_share]
    metrics += [ms.logit_difference(), ms.logit_difference(" to", " a")]
    criteria = [ms.drop_at_most(0.5), ms.drop_at_most(0.5, each_token=True), ms.kl_at_most(0.5)]
    criteria += [ms.change_at_most(0.5), ms.same_greedy_text]
    results = [
        task,
        writes,
        svd,
        layers,
        sub,
        svd.source,
        ms.find_sites(load_real("embedded").model),
    ]
    return gates, metrics, criteria, results


def again(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.fault(58)
def test_whatever_is_public_can_go_to_another_process():
    for name in set(ms.__all__) - {"figures"}:  # a module, which pickle takes by its name alone
        public = getattr(ms, name)
        assert describe_value(again(public)) == describe_value(public), name
        if isinstance(public, type) or inspect.isfunction(public):
            assert again(public) is public, name
    gates, metrics, criteria, results = movable()
    measured = ms.measure(*small()[:2], [gates["keep"]], progress=False)
    x = torch.randn(1, 5, small()[2].d_model)
    sites = ms.find_sites(small()[0])
    for value in (*gates.values(), *metrics, *results):
        assert describe_value(again(value)) == describe_value(value)
    for name, edit in gates.items():
        row = x.expand(3, -1, -1) if name == "stack" else x
        torch.testing.assert_close(again(edit)(row, hook=sites[0]), edit(row, hook=sites[0]))
    for criterion in criteria:
        torch.testing.assert_close(again(criterion)(again(measured)), criterion(measured))


@pytest.mark.fault(58)
def test_errors_can_come_back_from_another_process():
    model, task, svd = small()
    wrong = [
        lambda: ms.measure(model, task, [lambda x, hook: x[:, :1]]),
        lambda: ms.measure(model, task, [times]),
        lambda: ms.measure(model, task, [ms.keep(torch.eye(3))]),
        lambda: ms.measure(model, task, [ms.keep(svd)], layers=[99]),
        lambda: ms.measure(model, task, [ms.keep(svd)], layer=[1]),
        lambda: ms.load_model("no/such/directory/at/all"),
        lambda: ms.load("no such file"),
        lambda: svd.subspace(1000),
    ]
    for call in wrong:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        copy = again(caught.value)
        assert (type(copy), str(copy)) == (type(caught.value), str(caught.value))


def measured_there(edit, metric, criterion):
    model = load_real("embedded").model  # its own in a new process, the parent's in a forked one
    torch.set_num_threads(1)
    found = ms.measure(model, load_real("embedded").task, [edit], metric=metric, progress=False)
    return found, criterion(found)


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.fault(58)
def test_a_pool_of_processes_gives_what_one_process_gives(start):
    gates, metrics, criteria, _ = movable()
    edits = [gates[name] for name in ("keep", "per layer", "chain")]
    jobs = list(zip(edits, [metrics[1], metrics[6], metrics[0]], criteria, strict=False))
    right = [measured_there(*job) for job in jobs]
    with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
        found = list(pool.map(measured_there, *zip(*jobs, strict=True)))
    for (one, margin), (other, its) in zip(found, right, strict=True):
        torch.testing.assert_close(one.value, other.value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(margin, its, rtol=1e-5, atol=1e-5)
        assert describe_value(one.source) == describe_value(other.source)


def in_child(model, task, sender):
    try:
        sender.send(float(ms.measure(model, task, [ms.chain()], progress=False).log_prob))
    except RuntimeError as error:
        sender.send(str(error))


@pytest.mark.parametrize("by", ["nobody", "this thread", "another thread"])
@pytest.mark.fault(58)
def test_a_process_forked_while_a_thread_runs_the_model_works_or_is_refused(by):
    model, task = tiny("Llama"), tiny_task()
    right = float(ms.measure(model, task, [ms.chain()]).log_prob)
    held, done = threading.Event(), threading.Event()

    def hold():
        with alone(model):
            held.set()
            done.wait(20)

    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_child, args=(model, task, sender))
    thread = threading.Thread(target=hold)
    with ExitStack() as stack:
        if by == "another thread":
            thread.start()
            assert held.wait(5)
        elif by == "this thread":
            stack.enter_context(alone(model))
        child.start()
        assert receiver.poll(60)
        answer = receiver.recv()
        done.set()
    child.join(10)
    if by == "another thread":
        thread.join(5)
        assert "cannot run this model: another thread was running it" in answer
    else:
        assert answer == pytest.approx(right, rel=1e-6)
