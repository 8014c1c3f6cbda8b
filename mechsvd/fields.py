"""Check that a result's fields are as declared and its values possible.

Types, dtypes and shapes are cheap to read, so every constructor checks them.
What a tensor holds is checked on loading.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_DTYPES: dict[str, tuple[str, set[torch.dtype]]] = {
    "Float": ("a float tensor", {torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    "Int": (
        "a tensor of signed whole numbers",
        {torch.int8, torch.int16, torch.int32, torch.int64},
    ),
    "Bool": ("a tensor of truth values", {torch.bool}),
}
ROUNDED = -1e-4  # the least divergence: none is negative but by rounding
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    type(None): "None",
}


def require_declared(result: Any) -> None:
    """Refuse fields whose types or shapes differ from their annotations.

    Axes of one name must have one size in all tensors of the result.
    Only types, dtypes and shapes are read.

    Raises:
        TypeError: a field has another type or dtype.
        ValueError: a tensor has another number of axes, or an axis of another size than elsewhere.
    """
    sizes: dict[str, tuple[int, str]] = {}
    cls: Any = type(result)
    for name, hint, fits, axes in _declared(cls):
        value = getattr(result, name)
        if not fits(value):
            raise TypeError(
                f"{_field(result, name)} is {_described(value)}, but must be {_expected(hint)}."
            )
        if not isinstance(value, Tensor):
            continue
        shape = list(value.shape)
        if len(shape) != len(axes):
            raise ValueError(
                f"{_field(result, name)} has shape {shape}, "
                f"but must have the axes [{', '.join(axes)}]."
            )
        for axis, size in zip(axes, shape, strict=True):
            expected, other = sizes.setdefault(axis, (size, name))
            if size != expected:
                raise ValueError(
                    f"{_field(result, name)} has shape {shape}, but its axis `{axis}` must have "
                    f"size {expected}, as in `{other}`."
                )


def require_length(result: Any, name: str, length: int, counted: str) -> None:
    """Refuse a field that does not have one entry for each thing `counted` names."""
    if len(getattr(result, name)) != length:
        actual = len(getattr(result, name))
        raise ValueError(
            f"{_field(result, name)} has length {actual}, but must have {length}: "
            f"one for each {counted}."
        )


def require_finite(result: Any, *names: str) -> None:
    """Refuse tensors and numbers that hold NaN or inf."""
    for name in names:
        finite = _numbers(getattr(result, name)).isfinite()
        if not finite.all():
            first = (~finite).nonzero()[0].tolist()
            where = f", first at {first}" if first else ""
            raise ValueError(f"{_field(result, name)} holds NaN or inf{where}, but must be finite.")


def require_between(
    result: Any, names: Sequence[str], low: float | int, high: float | int = float("inf")
) -> None:
    """Refuse values outside a range; NaN and None pass, since some results may hold them."""
    for name in names:
        value = getattr(result, name)
        entries = _numbers([] if value is None else value).flatten()
        outside = entries[(entries < low) | (entries > high)]
        if len(outside):
            allowed = f"{low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
            raise ValueError(
                f"{_field(result, name)} holds {outside[0].item():g}, but must be {allowed}."
            )


def require_falling(result: Any, name: str) -> None:
    """Refuse a tensor with one axis whose entries rise."""
    values = getattr(result, name)
    rises = (values[1:] > values[:-1]).nonzero().flatten().tolist()
    if rises:
        before, after = values[rises[0] : rises[0] + 2].tolist()
        raise ValueError(
            f"{_field(result, name)} rises from {before:g} to {after:g} at place {rises[0] + 1}, "
            "but must fall."
        )


def named(class_name: str) -> str:
    """The name of a class with its article."""
    return f"{'an' if class_name[0] in 'AEIOU' else 'a'} {class_name}"


def _field(result: Any, name: str) -> str:
    return f"`{name}` of {named(type(result).__name__)}"


class _Declared(NamedTuple):
    """A field: its annotation, whether a value fits that, and the axes if it is a tensor."""

    name: str
    hint: Any
    fits: Callable[[Any], bool]
    axes: tuple[str, ...]


@cache
def _declared(cls: Any) -> tuple[_Declared, ...]:
    hints = get_type_hints(cls)  # "Measurement | None" is text until the class exists
    return tuple(
        _Declared(name, hint, _test_of(hint), _axes_of(hint)) for name, hint in hints.items()
    )


def _test_of(hint: Any) -> Callable[[Any], bool]:
    """Make the test whether a value is of the type, or the dtype, that an annotation declares."""
    inner = get_args(hint)
    if hasattr(hint, "dim_str"):
        dtypes = _tensors(hint)[1]
        return lambda value: isinstance(value, Tensor) and value.dtype in dtypes
    if get_origin(hint) in (Union, UnionType):
        options = [*map(_test_of, inner)]
        return lambda value: any(fits(value) for fits in options)
    if get_origin(hint) is not tuple:
        is_a = _kind_test(hint)
        return lambda value: is_a(type(value))
    if inner[-1] is not Ellipsis:
        items = [*map(_test_of, inner)]
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(items)
            and all(fits(item) for fits, item in zip(items, value, strict=True))
        )
    if get_args(inner[0]):
        item_fits = _test_of(inner[0])
        return lambda value: isinstance(value, tuple) and all(map(item_fits, value))
    is_a = _kind_test(inner[0])  # checked by type: a text has many tokens
    return lambda value: isinstance(value, tuple) and all(map(is_a, {*map(type, value)}))


def _kind_test(hint: Any) -> Callable[[type], bool]:
    if hint is Any:
        return lambda kind: True
    if hint is bool:
        return lambda kind: kind is bool
    kinds = (int, float) if hint is float else hint
    return lambda kind: issubclass(kind, kinds) and kind is not bool  # a bool is no number


def _axes_of(hint: Any) -> tuple[str, ...]:
    parts = (part for part in (hint, *get_args(hint)) if hasattr(part, "dim_str"))
    return next((tuple(part.dim_str.split()) for part in parts), ())


def _tensors(hint: Any) -> tuple[str, set[torch.dtype]]:
    return _DTYPES[hint.__name__.partition("[")[0]]


def _numbers(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"


def _expected(hint: Any) -> str:
    """What an annotation declares, in words."""
    if hasattr(hint, "dim_str"):
        return f"{_tensors(hint)[0]} [{', '.join(hint.dim_str.split())}]"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_expected, get_args(hint)))
    if get_origin(hint) is tuple:
        inner = [_expected(part) for part in get_args(hint) if part is not Ellipsis]
        return f"a tuple ({', '.join(inner)}{', …' if Ellipsis in get_args(hint) else ''})"
    return _WORDS.get(hint) or named(hint.__name__)
