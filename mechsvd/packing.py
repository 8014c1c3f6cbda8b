"""Results to a JSON document with named tensors, and back; no file is trusted."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torch import Tensor

from mechsvd.fields import named


def pack(result: Any) -> tuple[str, dict[str, Tensor]]:
    """Turn a result into JSON, and the tensors that it refers to by name."""
    tensors: dict[str, Tensor] = {}
    document = {"class": type(result).__name__, "value": _pack(result, "", tensors)}
    return json.dumps(document, ensure_ascii=False, sort_keys=True), tensors


def unpack(body: str, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    """Restore the result that `pack` was given, and check its fields and values.

    Raises:
        TypeError, ValueError: anything that `pack` would not have written, naming the field.
        RecursionError: the document is nested too deeply.
    """
    try:
        document = json.loads(body)
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if (
        not isinstance(document, dict)
        or document.keys() != {"class", "value"}
        or not isinstance(document["value"], dict)
    ):
        raise ValueError("its header must have a `class` and a `value`, but does not")
    reader = _Reader(dict(tensors), classes)
    value = reader.read(document["value"], "")
    if type(value).__name__ != document["class"]:
        raise ValueError(
            f"its header names the class {document['class']!r:.40}, "
            f"but holds {named(type(value).__name__)}"
        )
    if reader.left:
        raise ValueError(f"it has tensors that belong to no field: {sorted(reader.left)[:5]}")
    return value


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if is_dataclass(value) and not isinstance(value, type):
        stored_fields = [
            f for f in fields(value) if not _is_default(getattr(value, f.name), f.default)
        ]
        packed = {
            f.name: _pack(getattr(value, f.name), f"{name}.{f.name}".lstrip("."), tensors)
            for f in stored_fields
        }
        return {"class": type(value).__name__, "fields": packed}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _is_default(value: Any, default: Any) -> bool:
    """Whether a text is the default of its field.

    Such a field is left out, so that versions without it can read the file.
    """
    return type(value) is type(default) and isinstance(value, str) and value == default


class _Reader:
    """Reads a document; `left` are the tensors that no field has taken yet."""

    def __init__(self, left: dict[str, Tensor], classes: Mapping[str, type]) -> None:
        self.left, self.classes = left, classes

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, list):
            return tuple(self.read(item, f"{name}.{i}") for i, item in enumerate(value))
        if not isinstance(value, dict):
            return value
        if value.keys() == {"tensor"}:
            if value["tensor"] != name or name not in self.left:
                raise ValueError(
                    f"`{name}` must be the tensor of that name, but is {value['tensor']!r:.40}, "
                    "or there is none"
                )
            return self.left.pop(name)
        cls = self._class_of(value, name)
        result = cls(
            **{
                key: self.read(item, f"{name}.{key}".lstrip("."))
                for key, item in value["fields"].items()
            }
        )
        if hasattr(result, "_require_values"):
            result._require_values()
        return result

    def _class_of(self, value: dict[str, Any], name: str) -> type:
        """The class that a packed result names, once its fields fit the class."""
        where = f"`{name}`" if name else "it"
        if value.keys() != {"class", "fields"} or not isinstance(value["fields"], dict):
            raise ValueError(
                f"{where} must be a tensor, or a result with a `class` and `fields`, "
                f"but has {sorted(value)[:5]}"
            )
        cls = self.classes.get(value["class"]) if isinstance(value["class"], str) else None
        if cls is None:
            raise ValueError(
                f"{where} is of the class {value['class']!r:.40}, which this version does not know"
            )
        known = {field.name: field.default is MISSING for field in fields(cls)}
        lacking = [
            field
            for field, is_needed in known.items()
            if is_needed and field not in value["fields"]
        ]
        if lacking:  # a file of an older version may lack newer fields, which have defaults
            raise ValueError(
                f"{named(cls.__name__)} needs the fields {lacking}, which {where} lacks"
            )
        if unknown := sorted(value["fields"].keys() - known.keys()):
            raise ValueError(
                f"{where} has the fields {unknown[:5]}, "
                f"which {named(cls.__name__)} of this version does not have"
            )
        return cls
