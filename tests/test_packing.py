"""Damaged files, and files with a right checksum but wrong content: refused by name."""

import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mechsvd.results import _digest
from tests.test_fields import tiny_results
from tests.test_results import same

NAMES = sorted(tiny_results())
NAN_IS_LEGITIMATE = {
    "ridge_values",  # f may not be finite without some directions
    "clip_values",
    "first_scores",
    "second_scores",
    "both_scores",
    "whole",
    "log_probs",
    "orig_deltas",
    "kept_deltas",
    "margins",
    "integrated",
    "measured",
    "block_error",
    "effects",  # an edit may make the model overflow
    "kl_divergences",
    "induction",  # where attention patterns cannot be reached
    "agreement",  # of constants, and of directions without a neuron
    "chance",
    "p_values",  # of one direction
    "bounds",
    "random_effects",
    "token_changes",  # beyond the last token of a short text
    "low",  # of fewer than three texts
    "high",
}


def saved(name, tmp_path):
    result = tiny_results()[name]
    result.save(tmp_path / f"{name}.safetensors")
    return result, tmp_path / f"{name}.safetensors"


def rewritten(path, change):
    """Write a file again after a change of its document and tensors, with the right checksum."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    document, tensors = json.loads(metadata["mechsvd"]), load_file(path)
    body = change(document, tensors)
    body = body if isinstance(body, str) else json.dumps(document)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(
        tensors, path, metadata={**metadata, "mechsvd": body, "sha256": _digest(body, tensors)}
    )


def loaded_or_refused(result, path):
    """The result, or None where it is refused by an error that names the file."""
    try:
        return type(result).load(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"an error that does not name the file: {error}") from error
        return None


@pytest.mark.fault(31)
@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_of_a_file_is_refused(name, tmp_path):
    result, path = saved(name, tmp_path)
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        assert loaded_or_refused(result, path) is None, length


@pytest.mark.fault(31)
@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_refused_or_changes_nothing(name, tmp_path):
    result, path = saved(name, tmp_path)
    content = path.read_bytes()
    bits = range(8 * len(content))
    for bit in random.Random(name).sample(bits, 400):  # others in each of the 30 files
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        loaded = loaded_or_refused(result, path)
        assert loaded is None or same(loaded, result), bit


def places(value):
    """Every place in a document, as a container and a key."""
    for key, item in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield value, key
        yield from places(item)


WRONG = (
    {"a": 1},
    [[["x"]]],
    {"tensor": "elsewhere"},
    {"class": "Unknown", "fields": {}},
    {"class": ["Task"], "fields": {}},
    {"class": "Site", "fields": []},
)


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", NAMES)
def test_structured_damages_with_a_right_checksum_are_refused(name, tmp_path):
    result, path = saved(name, tmp_path)
    content, generator = path.read_bytes(), random.Random(name)

    def damage(document, tensors):
        container, key = generator.choice(list(places(document)))
        container[key] = generator.choice(WRONG)

    for _ in range(60):
        path.write_bytes(content)
        rewritten(path, damage)
        assert loaded_or_refused(result, path) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_unknown_field_is_refused_unless_it_has_a_default(name, tmp_path):
    result, path = saved(name, tmp_path)
    content = path.read_bytes()
    for field in tiny_results()[name].__dataclass_fields__.values():
        if isinstance(getattr(result, field.name), torch.Tensor) or "MISSING" not in repr(
            field.default
        ):
            continue
        path.write_bytes(content)
        rewritten(
            path,
            lambda document, tensors, name=field.name: (
                document["value"]["fields"].pop(name) and None
            ),
        )
        with pytest.raises(
            ValueError, match=rf"{path}, of mechsvd .* needs the fields \['{field.name}'\]"
        ):
            type(result).load(path)
    path.write_bytes(content)
    rewritten(path, lambda document, tensors: document["value"]["fields"].update(later=1))
    with pytest.raises(
        ValueError,
        match=rf"{path}, of mechsvd .* has the fields \['later'\], which an? {name} of this version",
    ):
        type(result).load(path)


@pytest.mark.fault(33)
def test_a_file_of_an_older_version_may_lack_fields_that_have_defaults(tmp_path):
    _, path = saved("Task", tmp_path)
    rewritten(path, lambda document, tensors: document["value"]["fields"].pop("pieces") and None)
    assert loaded_or_refused(tiny_results()["Task"], path).pieces == ()


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_another_kind_or_with_nan_is_refused(name, tmp_path):
    result, path = saved(name, tmp_path)
    content = path.read_bytes()
    damages = {
        "another dtype": lambda tensor: (
            tensor.int() if tensor.is_floating_point() else tensor.float()
        ),
        "one more axis": lambda tensor: tensor[None],
        "no axis": lambda tensor: tensor.flatten()[0],
        "NaN": lambda tensor: torch.where(
            torch.arange(tensor.numel()).view(tensor.shape) == 0, torch.nan, tensor
        ),
    }
    for field in load_file(path):
        if "parts" in field and name in ("Loop", "Loops"):
            continue  # what a batch of any loop gave; the checksum guards it
        for damage, change in damages.items():
            if damage == "NaN" and (
                field.split(".")[-1] in NAN_IS_LEGITIMATE
                or not load_file(path)[field].is_floating_point()
            ):
                continue
            rewritten(
                path,
                lambda document, tensors, f=field, c=change: tensors.update({f: c(tensors[f])}),
            )
            assert loaded_or_refused(result, path) is None, (field, damage)
            path.write_bytes(content)


def tensor(field, change):
    return lambda document, tensors: tensors.update({field: change(tensors[field])})


def entry(field, value):
    return lambda document, tensors: document["value"]["fields"].update({field: value})


UNTRUE = [
    ("Decomposition", tensor("directions", lambda x: 2 * x), "`directions` must have orthonormal columns"),
    ("Decomposition", tensor("directions", lambda x: x / x.norm(dim=0) + 0.1), "`directions` must have orthonormal columns"),
    ("Decomposition", tensor("directions", lambda x: x.T), "`directions` of a Decomposition has shape"),
    ("Decomposition", tensor("directions", lambda x: x / 0), "`directions` of a Decomposition holds NaN or inf, first at"),
    ("Decomposition", tensor("singular_values", lambda x: -x), "`singular_values` of a Decomposition holds -2, but must be 0 or more"),
    ("Decomposition", tensor("singular_values", lambda x: x.flip(0)), "`singular_values` of .* rises from 1 to 2 at place 1"),
    ("Decomposition", tensor("singular_values", lambda x: x[:1]), "its axis `rank` must have size 1, as in `singular_values`"),
    ("Decomposition", tensor("left", lambda x: 2 * x), "`left` must have columns of length 1, but has one of 2"),
    ("Decomposition", entry("layer", "3"), "`layer` of a Decomposition is str '3'"),
    ("Subspace", tensor("basis", lambda x: 2 * x), "orthonormal"),
    ("Task", tensor("tokens", lambda x: x - 1), "`tokens` of a Task holds -1"),
    ("Task", entry("prompt_length", 3), "Nothing to score"),
    ("Writes", tensor("task_index", lambda x: x - 1), "`task_index` of a Writes holds -1"),
    ("Measurement", tensor("log_probs", lambda x: -x), "`log_probs` of a Measurement holds 2, but must be from -inf to 0"),
    ("Measurement", tensor("clean.kept_deltas", lambda x: -x), "`kept_deltas` of a Measurement holds -1"),
    ("RankSweep", tensor("order", lambda x: x * 0), "`order` must name each of the 2 directions once"),
    ("RankSweep", tensor("ranks", lambda x: x + 1), "`ranks` of a RankSweep holds 3, but must be from 0 to 2"),
    ("RidgeSweep", tensor("alphas", lambda x: -x), "`alphas` of a RidgeSweep holds -3"),
    ("Ranking", tensor("singular_values", lambda x: x.flip(0)), "`singular_values` of a Ranking rises"),
    ("CriticalRank", tensor("sweep.ranks", lambda x: x.flip(0)), r"`sweep` must have rising ranks, but has \[2, 1, 0\]"),
    ("CriticalRank", entry("evaluations", -1), "`evaluations` of a CriticalRank holds -1"),
    ("Overlap", tensor("values", lambda x: torch.tensor([[1.0, 1.0], [0.0, 1.0]])), "`values` must be symmetric"),
    ("Overlap", tensor("deviation", lambda x: -x), "`deviation` of an Overlap holds -1"),
    ("Pool", tensor("random_low", lambda x: x + 3), "`random_mean` must lie between"),
    ("Pool", tensor("singular_values", lambda x: x.flip(0)), "`singular_values` of a Pool rises"),
    ("SelfCheck", entry("unchecked", [3]), "`unchecked` of a SelfCheck holds 3, but must be from 0 to 2"),
    ("Gradients", tensor("tokens", lambda x: x - 1), "`tokens` of a Gradients holds -1"),
    ("Attribution", tensor("vectors", lambda x: 2 * x), "`vectors` must have orthonormal columns"),
    ("Attribution", tensor("beside.0.1.residuals", lambda x: -x), "`residuals` of an Attribution holds -2"),
    ("Attribution", entry("value", float("nan")), "`value` of an Attribution holds NaN or inf, but must be finite"),
    ("Attribution", entry("products", 10**400), "a number in its header is too large"),
    ("Contrast", tensor("directions", lambda x: 2 * x), "`directions` of a Contrast must have orthonormal columns"),
    ("Contrast", tensor("values", lambda x: -x), "`values` of a Contrast holds -1, but must be"),
    ("Contrast", tensor("null_values", lambda x: -x), "`null_values` of a Contrast holds -1"),
    ("OrderComparison", tensor("values", lambda x: -x), "`values` of an OrderComparison holds -1"),
    ("LearnedSubspace", tensor("losses", lambda x: -x), "`losses` of a LearnedSubspace holds -2"),
    ("Faithfulness", tensor("divergences", lambda x: -x), "`divergences` of a Faithfulness holds -3"),
    ("WriteStream", tensor("moments.count", lambda x: 9 * x), r"`moments` count \[18, 18\] writes, but each site .* of 9 tokens"),
    ("WriteStream", tensor("moments.count", lambda x: x - torch.tensor([0, 1])), r"`moments` count \[2, 1\] writes"),
    ("Place", entry("empty", 3), "has 3 empty and 1 split of 3 documents"),
    ("Place", entry("fingerprint", ""), "a fingerprint of them; this one cannot be"),
    ("Place", entry("shard", [2, 2]), r"`shard` is \(2, 2\)"),
    ("Task", lambda document, tensors: tensors.update(more=torch.ones(1)), r"has tensors that belong to no field: \['more'\]"),
    ("Task", lambda document, tensors: tensors.clear(), "`tokens` must be the tensor of that name"),
    ("Measurement", entry("orig_deltas", {"tensor": "kept_deltas"}), "`orig_deltas` must be the tensor of that name, but is 'kept"),
    ("Task", lambda document, tensors: document.update({"class": "Writes"}), "its header names the class 'Writes', but holds a Task"),
    ("Task", lambda document, tensors: document["value"].update({"class": "Later"}), "class 'Later', which this version does not"),
    ("Task", entry("prompt_length", {"class": "Later", "fields": {}}), "`prompt_length` is of the class 'Later', which this"),
]  # fmt: skip


@pytest.mark.fault(47)
@pytest.mark.parametrize(("name", "change", "message"), UNTRUE)
def test_what_no_result_holds_is_refused_by_file_and_field(name, change, message, tmp_path):
    result, path = saved(name, tmp_path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=rf"{path}, of mechsvd .*{message}.* Nothing was loaded\."):
        type(result).load(path)


DEEP = 100_000
BODIES = [
    "",
    "{",
    "null",
    "3",
    '"x"',
    "[]",
    "{}",
    '{"class": "Task"}',
    '{"class": "Task", "value": []}',
    "1" * 5000,
]
BODIES += ["[" * DEEP, '{"a":' * DEEP, f'{{"class": "Task", "value": {"[" * 3000}1{"]" * 3000}}}']


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{body[:12]} of {len(body)}")
def test_a_header_that_is_no_document_is_refused(body, tmp_path):
    result, path = saved("Task", tmp_path)
    rewritten(path, lambda document, tensors: body)
    with pytest.raises(
        ValueError,
        match=rf"{path}, of mechsvd .*, cannot be used: its header (is|must).* Nothing was loaded\.",
    ):
        type(result).load(path)


def test_lists_too_deep_for_a_field_are_refused(tmp_path):
    result, path = saved("Task", tmp_path)
    for depth in (10, 300, 900):
        body = '{"class":"Task","value":{"class":"Task","fields":{"tokens":{"tensor":"tokens"},"prompt_length":1,"pieces":%s}}}'
        rewritten(
            path,
            lambda document, tensors, depth=depth, body=body: body % ("[" * depth + "]" * depth),
        )
        assert loaded_or_refused(result, path) is None


@pytest.mark.parametrize("written", ["0", "-5", "1.0", "01", " 1", "١", "", "one"])
def test_a_format_that_is_no_whole_number_from_1_is_refused(written, tmp_path):
    result, path = saved("Task", tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "format": written})
    with pytest.raises(
        ValueError,
        match=rf"{path} is damaged: its format is '{written}', but must be a whole number",
    ):
        type(result).load(path)
