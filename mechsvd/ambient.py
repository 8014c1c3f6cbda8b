"""The modes and settings of torch that a caller may be in, put aside for the time of a call."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import _C

Call = TypeVar("Call", bound=Callable[..., Any])
Setting = tuple[Callable[[], Any], Callable[[Any], Any], Any]  # read, write, the value in a call
_EXACT = ("none", "ieee")  # precisions of float32 products that are float32's own
_FUSED = ("flash", "mem_efficient", "cudnn")  # kernels of attention without second derivatives
# hooks on saved tensors; torch 2.6 does not say which there are
_top_hooks = getattr(_C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def plain(call: Call) -> Call:
    """Make a function compute the same whatever modes its caller is in; see `plain_torch`."""

    @functools.wraps(call)
    def run(*args: Any, **options: Any) -> Any:
        if _SETTINGS.calls_of_thread() and not _modes():  # within another call
            return call(*args, **options)
        with plain_torch():
            return call(*args, **options)

    return cast(Call, run)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Put aside what would change numbers in this block, and restore it, also after an exception.

    That is inference mode, autocast, modes that see every function of torch (a default device, fake
    tensors), hooks on saved tensors, anomaly detection, the default dtype, lossy float32 products,
    a choice of attention kernels, and errors of NumPy. Whether gradients are on stays as it is.
    """
    with ExitStack() as aside, _SETTINGS.aside():
        aside.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if torch.is_inference_mode_enabled():
            aside.enter_context(torch.inference_mode(False))
            aside.enter_context(torch.no_grad())  # the line before turns them on
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                aside.enter_context(torch.autocast(kind, enabled=False))
        while _C._len_torch_function_stack():
            aside.callback(_C._push_on_torch_function_stack, _C._pop_torch_function_stack())
        if _C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            aside.enter_context(_disable_current_modes())
        while (hooks := _top_hooks(True)) is not None:
            _C._autograd._pop_saved_tensors_default_hooks()
            aside.callback(_C._autograd._push_saved_tensors_default_hooks, *hooks)
        yield


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention on torch's plain kernels in this block, since the fused ones have no second
    derivative."""
    with _SETTINGS.aside(fused=False):
        yield


def _modes() -> bool:
    """Whether this thread is in a mode that `plain_torch` puts aside."""
    return bool(
        torch.is_inference_mode_enabled()
        or _C._is_any_autocast_enabled()
        or _C._len_torch_function_stack()
        or _C._len_torch_dispatch_stack()
        or _top_hooks(True)
    )


class _Settings:
    """Settings of the whole process, put aside while any of its threads is in a call."""

    def __init__(self) -> None:
        self._lock, self._local = threading.RLock(), threading.local()
        self._calls = self._unfused = 0
        self._saved: list[tuple[Setting, Any]] = []

    @contextmanager
    def aside(self, fused: bool = True) -> Iterator[None]:
        """Put them aside for a block.

        Args:
            fused: let attention run on fused kernels; off while any thread has them off.
        """
        with self._lock:
            if self._calls == 0:
                self._put_aside()
            self._calls += 1
            self._let_fuse(0 if fused else 1)
        self._local.calls = self.calls_of_thread() + 1
        try:
            yield
        finally:
            self._local.calls -= 1
            with self._lock:
                self._calls -= 1
                self._let_fuse(0 if fused else -1)
                if self._calls == 0:
                    self._put_back()

    def calls_of_thread(self) -> int:
        """How many calls of this thread have put them aside, one within the other."""
        return int(getattr(self._local, "calls", 0))

    def _put_aside(self) -> None:
        self._saved = []
        for setting in _settings():  # one after the other, since some follow from others
            read, write, value = setting
            self._saved.append((setting, now := read()))
            if now != value and not (value == "ieee" and now in _EXACT):
                write(value)

    def _put_back(self) -> None:
        for (read, write, _), before in reversed(self._saved):
            if read() != before:
                write(before)

    def _let_fuse(self, change: int) -> None:
        """Count the calls without fused attention; the first turns it off, the last one on."""
        before, self._unfused = self._unfused, self._unfused + change
        if bool(before) != bool(self._unfused):
            for kind in _FUSED:
                getattr(torch.backends.cuda, f"enable_{kind}_sdp")(before > 0)

    def forget_threads(self) -> None:
        """In a forked process no other thread holds the lock."""
        self._lock = threading.RLock()


def _settings() -> list[Setting]:
    cuda = torch.backends.cuda
    settings: list[Setting] = [
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        (torch.is_anomaly_enabled, _detect_anomalies, False),
        *(
            (getattr(cuda, f"{kind}_sdp_enabled"), getattr(cuda, f"enable_{kind}_sdp"), True)
            for kind in (*_FUSED, "math")
        ),
    ]
    if not hasattr(_C, "_get_fp32_precision_getter"):  # before torch 2.9
        read, write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        return [*settings, (read, write, "highest")]
    backends = [
        ("generic", "all"),
        *((b, op) for b in ("mkldnn", "cuda") for op in ("all", "matmul")),
    ]
    return settings + [
        (
            functools.partial(_C._get_fp32_precision_getter, *place),
            functools.partial(_C._set_fp32_precision_setter, *place),
            "ieee",
        )
        for place in backends
    ]


def _detect_anomalies(is_on: bool) -> None:
    torch.set_anomaly_enabled(is_on, torch.is_anomaly_check_nan_enabled())


_SETTINGS = _Settings()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_SETTINGS.forget_threads)
