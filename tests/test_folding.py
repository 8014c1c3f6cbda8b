"""An edit in the weights does what its hooks do, or nothing is written."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mechsvd as ms
from mechsvd.edits.folding import fold_map
from mechsvd.experiments import exports
from mechsvd.model.identity import fingerprint
from tests.conftest import ACCEPTED, _configurations, finishes, known, tiny, tiny_hf, tiny_task

pytestmark = pytest.mark.older

SITE = ms.Site(0, "attn", "blocks.0.hook_attn_out")
FOLDS = [name for name in ACCEPTED if name not in ("Gemma-2", "OLMo-2")]  # a norm follows the map
BIASED = ["GPT-2", "GPT-NeoX", "Phi", "OPT", "Bloom"]

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits[0]
ours = [name for name in sys.modules if name.split(".")[0] in ("mechsvd", "transformer_lens")]
print(json.dumps([ours, ids[0].tolist(), logits.tolist()]))
"""


def hooked_logits(model, tokens, edit, **where):
    with torch.no_grad():
        return model.run_with_hooks(tokens[None], fwd_hooks=ms.fwd_hooks(model, edit, **where))[0]


def plain_logits(folder, tokens):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(tokens[None]).logits[0]


def fitted(architecture):
    model, task = tiny(architecture), tiny_task()
    writes = ms.collect_writes(model, task)
    return model, task, writes, ms.decompose(writes)


# the algebra


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_a_folded_map_is_the_map_and_then_the_edit_in_float64(rank):
    generator = torch.Generator().manual_seed(rank)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    basis, columns, bias, y = ms.span(draw(8, 5)).basis, draw(6, 8), draw(8), draw(4, 6)
    other = torch.linalg.qr(draw(8, 8))[0]
    point = ms.Baseline(draw(1, 1, 1, 8), (SITE,), "mean")
    gates = [
        ms.gate(basis, draw(5), rest=0.3, baseline=point),
        ms.keep(other, rank, baseline=point),
    ]
    new, offset = fold_map(ms.chain(*gates), SITE, columns, bias)
    expected = y @ columns + bias
    m = point.values[0, 0]
    for gate in gates:  # the affine formula with dense matrices
        v = gate.basis
        dense = v @ torch.diag(gate.gains) @ v.T + gate.rest * (torch.eye(8) - v @ v.T)
        expected = m + (expected - m) @ dense.T
    torch.testing.assert_close(y @ new + offset, expected, rtol=0, atol=1e-12)


# the checkpoint


def test_a_folded_checkpoint_gives_the_hooks_logits_without_our_code(real, tmp_path):
    edit = ms.chain(ms.keep(real.svd, 32), ms.ablate(real.svd.directions[:, 3:4]))
    report = ms.fold(real.model, edit, tmp_path / "out", real.task)
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "out"), real.prompt]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    ours, ids, logits = json.loads(run.stdout.splitlines()[-1])
    assert ours == []
    assert ids == real.task.tokens[: real.task.prompt_length].tolist()
    hooked = hooked_logits(real.model, torch.tensor(ids), edit)
    torch.testing.assert_close(torch.tensor(logits), hooked, rtol=0, atol=1e-4)
    assert float(report.difference.max()) < 1e-4
    assert float(report.saved_difference.max()) < 1e-4
    # the edit is no small one, so equality is no accident
    clean = hooked_logits(real.model, torch.tensor(ids), ms.chain())
    assert float((hooked - clean).abs().max()) > 1


def test_the_report_is_what_its_names_say(real, tmp_path):
    edit = ms.keep(real.svd, 32)
    report = ms.fold(real.model, edit, tmp_path / "out", real.task)
    tokens, scored = real.task.tokens, real.task.scored
    plain, hooked, clean = (
        x.double()
        for x in (
            plain_logits(tmp_path / "out", tokens),
            hooked_logits(real.model, tokens, edit),
            hooked_logits(real.model, tokens, ms.chain()),
        )
    )
    assert float(report.saved_difference) == pytest.approx(
        float((plain - hooked).abs().max()), rel=0.5
    )
    assert float(report.largest_logit) == pytest.approx(float(hooked.abs().max()))
    p, q = clean[scored].log_softmax(-1), hooked[scored].log_softmax(-1)
    kl = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert float(report.edit_divergence) == pytest.approx(float(kl), rel=1e-4)
    measured = ms.measure(real.model, real.task, edit).kl_divergence
    assert float(report.edit_divergence) == pytest.approx(float(measured), rel=1e-4)
    assert abs(float(report.kl_divergence)) < 1e-8
    for name, digest in zip(report.files, report.sha256, strict=True):
        content = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    on_disk = {path.name for path in (tmp_path / "out").iterdir()}
    assert on_disk == {*report.files, exports.REPORT}
    again = ms.FoldReport.load(tmp_path / "out" / exports.REPORT)
    assert again.sha256 == report.sha256
    assert again.sites == ms.find_sites(real.model)


def test_only_the_weights_that_write_change_and_the_configuration_stays(real, tmp_path):
    report = ms.fold(real.model, ms.ablate(real.svd, 1), tmp_path / "out", real.task)
    new = load_file(tmp_path / "out" / "model.safetensors")
    old = load_file(real.directory / "model.safetensors")
    changed = {name for name in new if not torch.equal(new[name], old[name].to(new[name]))}
    assert changed == set(report.weights)
    layers = range(real.n_layers)
    assert changed == {
        f"model.layers.{i}.{part}.weight" for i in layers for part in ("self_attn.o_proj", "mlp.down_proj")
    }  # fmt: skip
    configs = [
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", real.directory)
    ]
    for config in configs:
        config.pop("dtype")  # the embedded weights are stored in half, and loaded in single
        config.pop("transformers_version")
    assert configs[0] == configs[1]


@pytest.mark.fault(22)
def test_an_edit_in_place_is_the_hooks_and_leaves_every_weight_as_it_was(real):
    edit, tokens = ms.keep(real.svd, 32), real.task.tokens
    before = {n: p.clone() for n, p in nn.Module.named_parameters(real.model)}
    places = {n: p.data_ptr() for n, p in nn.Module.named_parameters(real.model)}
    own, hooked = fingerprint(real.model), hooked_logits(real.model, tokens, edit)
    with ms.folded(real.model, edit) as model:
        assert model is real.model
        assert fingerprint(model) != own
        inside = hooked_logits(model, tokens, ms.chain())
    torch.testing.assert_close(inside, hooked, rtol=0, atol=1e-4)
    with pytest.raises(KeyboardInterrupt), ms.folded(real.model, edit):
        raise KeyboardInterrupt
    for name, parameter in nn.Module.named_parameters(real.model):
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == places[name]


def test_the_reversed_order_of_a_chain_is_another_model(real):
    first, second = ms.keep(real.svd, 32), ms.shrink(real.svd, 100.0)
    tilted = ms.keep(ms.span(torch.eye(real.d_model)[:, :20]))
    for edit in (ms.chain(first, tilted), ms.chain(tilted, first), ms.chain(second, tilted)):
        hooked = hooked_logits(real.model, real.task.tokens, edit)
        with ms.folded(real.model, edit):
            inside = hooked_logits(real.model, real.task.tokens, ms.chain())
        torch.testing.assert_close(inside, hooked, rtol=0, atol=1e-4)


def test_each_site_has_its_own_basis(real, tmp_path, silent):
    writes = ms.collect_writes(real.model, real.task)
    edit = ms.keep(ms.decompose(writes, per="site"), 12)
    report = ms.fold(real.model, edit, tmp_path / "out", real.task)
    hooked = hooked_logits(real.model, real.task.tokens, edit)
    plain = plain_logits(tmp_path / "out", real.task.tokens)
    torch.testing.assert_close(plain, hooked, rtol=0, atol=1e-4)
    assert len(report.weights) == 2 * real.n_layers
    pooled = hooked_logits(real.model, real.task.tokens, ms.keep(real.svd, 12))
    assert float((pooled - hooked).abs().max()) > 0.1


def test_some_sites_alone_are_folded(real, tmp_path):
    where = {"layers": [1], "components": ["mlp"]}
    edit = ms.keep(real.svd, 8)
    report = ms.fold(real.model, edit, tmp_path / "out", real.task, **where)
    assert report.weights == ("model.layers.1.mlp.down_proj.weight",)
    hooked = hooked_logits(real.model, real.task.tokens, edit, **where)
    plain = plain_logits(tmp_path / "out", real.task.tokens)
    torch.testing.assert_close(plain, hooked, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_single_and_as_saved(tmp_path, dtype):
    model = known(ms.load_model(device="cpu", dtype=dtype))
    task = ms.Task.from_text(model, "I believe the meaning of life is", " to be happy")
    svd = ms.decompose(ms.collect_writes(model, task))
    before = {n: p.clone() for n, p in nn.Module.named_parameters(model)}
    report = ms.fold(model, ms.ablate(svd, 3), tmp_path / "out", task)
    assert {n: p.dtype for n, p in nn.Module.named_parameters(model)} == dict.fromkeys(
        before, dtype
    )
    assert all(torch.equal(p, before[n]) for n, p in nn.Module.named_parameters(model))
    assert model.cfg.dtype == dtype
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert float(report.difference) < 1e-4
    # the saved one differs by what the dtype does to the unedited model, too
    assert 1e-4 < float(report.saved_difference) < 3 * float(report.dtype_difference)


# architectures


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_an_architecture_folds_exactly_or_is_refused(architecture, tmp_path):
    model, task, _, svd = fitted(architecture)
    edit = ms.chain(ms.keep(svd, 5), ms.ablate(svd.directions[:, 1:2]))
    if architecture not in FOLDS:
        for call in (lambda: ms.fold(model, edit, tmp_path / "out", task),
                     lambda: ms.folded(model, edit).__enter__()):  # fmt: skip
            with pytest.raises(ValueError, match="4 of 4 sites have no one linear map .*post-norm"):
                call()
        assert not any(tmp_path.iterdir())
        return
    ms.fold(model, edit, tmp_path / "out", task)
    hooked = hooked_logits(model, task.tokens, edit)
    plain = plain_logits(tmp_path / "out", task.tokens)
    torch.testing.assert_close(plain, hooked, rtol=0, atol=1e-5)
    assert float((hooked - hooked_logits(model, task.tokens, ms.chain())).abs().max()) > 1e-2


@pytest.mark.parametrize("architecture", FOLDS)
def test_a_mean_is_folded_into_biases_and_refused_without_them(architecture, tmp_path):
    model, task, writes, svd = fitted(architecture)
    mean = ms.mean_baseline(writes)
    edit = ms.chain(ms.ablate(svd, 4, baseline=mean), ms.keep(svd, 9, baseline=mean))
    if architecture not in BIASED:
        with pytest.raises(ValueError, match="at layer 0 attn, but the map .* no bias"):
            ms.fold(model, edit, tmp_path / "out", task)
        assert not any(tmp_path.iterdir())
        return
    report = ms.fold(model, edit, tmp_path / "out", task)
    assert len(report.weights) == 8  # weights and biases
    hooked = hooked_logits(model, task.tokens, edit)
    plain = plain_logits(tmp_path / "out", task.tokens)
    torch.testing.assert_close(plain, hooked, rtol=0, atol=1e-5)
    zero = hooked_logits(model, task.tokens, ms.chain(ms.ablate(svd, 4), ms.keep(svd, 9)))
    assert float((hooked - zero).abs().max()) > 1e-4


@pytest.mark.parametrize("architecture", ["GPT-2", "Llama"])
def test_tied_embeddings_are_left_alone(architecture, tmp_path):
    import transformers as hf

    config = _configurations()[architecture]()
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    plain = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.config.architectures = [type(plain).__name__]
    own = plain.get_input_embeddings().weight.detach().clone()
    model, task = tiny(architecture, plain), tiny_task()
    edit = ms.keep(ms.decompose(ms.collect_writes(model, task)), 5)
    ms.fold(model, edit, tmp_path / "out", task)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, own)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_experts_are_refused_and_counted(tmp_path):
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.MixtralConfig(
        **sizes, vocab_size=256, intermediate_size=64, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64, pad_token_id=None,
    )  # fmt: skip
    plain = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model, task = tiny("Mixtral", plain), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    with pytest.raises(ValueError, match="2 of 4 sites have no one linear map .* layer 0 mlp"):
        ms.fold(model, ms.keep(svd, 5), tmp_path / "out", task)
    assert not any(tmp_path.iterdir())
    # all that is asked for, and no more
    report = ms.fold(model, ms.keep(svd, 5), tmp_path / "out", task, components=["attn"])
    assert len(report.weights) == 2


def test_a_weight_that_two_layers_share_is_refused(tmp_path):
    plain = tiny_hf("Llama")
    first, second = plain.model.layers
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    model, task = tiny("Llama", plain), tiny_task()
    svd = ms.decompose(ms.collect_writes(model, task))
    with pytest.raises(ValueError, match="shared with other modules"):
        ms.fold(model, ms.keep(svd, 5), tmp_path / "out", task)


# refusals


def test_edits_that_weights_cannot_hold_are_refused(embedded, meaning, meaning_svd, tmp_path):
    writes = ms.collect_writes(embedded, meaning)
    keep = ms.keep(meaning_svd, 9)
    by_position = ms.mean_baseline(writes, by="position")
    donor = ms.donor_baseline(embedded, meaning)
    rows = [
        (lambda x, hook=None: 0.5 * x, {}, TypeError, "Only gates and chains of them"),
        (ms.shift(torch.ones(128)), {}, TypeError, "Only gates .* this is Shift"),
        (ms.chain(keep, ms.shift(torch.ones(128))), {}, TypeError, "Only gates"),
        (ms.gate(meaning_svd, torch.ones(3, 128)), {}, ValueError, "a stack of 3 edits"),
        (
            ms.keep(meaning_svd, 9, baseline=by_position),
            {},
            ValueError,
            "differs between positions",
        ),
        (ms.keep(meaning_svd, 9, baseline=donor), {}, ValueError, "differs between positions or t"),
        (ms.keep(meaning_svd, 9, baseline=ms.mean_baseline(writes)), {}, ValueError, "no bias"),
        (keep, {"positions": [3]}, ValueError, "`positions` cannot be folded"),
        (keep, {"at": "blocks.*.hook_resid_post"}, ValueError, "`at` cannot be folded"),
        (ms.keep(torch.eye(16)), {"at": "blocks.*.attn.hook_z", "heads": [1]}, ValueError, "`at` "),
        (ms.keep(torch.eye(64)), {}, ValueError, "has d_model 64, but the model's is 128"),
    ]
    own = fingerprint(embedded)
    for edit, options, kind, sentence in rows:
        with pytest.raises(kind, match=sentence):
            ms.fold(embedded, edit, tmp_path / "out", meaning, **options)
        with pytest.raises(kind, match=sentence), ms.folded(embedded, edit, **options):
            pass
        assert fingerprint(embedded) == own
        assert not any(tmp_path.iterdir())


def test_processed_weights_and_hooks_of_the_user_are_refused(
    meaning_svd, meaning, tmp_path, silent
):
    model = known(ms.load_model(device="cpu"))
    bare = replace(meaning_svd, source=None)
    mine = model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x * 2)])
    with mine, pytest.raises(ValueError, match=r"hooks of yours at blocks\.0"):
        ms.fold(model, ms.keep(bare, 9), tmp_path / "out", meaning)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="processed .* weights of its Hugging Face checkpoint"):
        ms.fold(model, ms.keep(bare, 9), tmp_path / "out", meaning)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_that_differs_from_the_hooks_is_not_put_in_place(
    embedded, meaning, meaning_svd, tmp_path, monkeypatch
):
    write = exports.write_checkpoint

    def damaged(model, replaced, folder):
        name = next(iter(replaced))
        write(model, {**replaced, name: 1.01 * replaced[name]}, folder)

    monkeypatch.setattr(exports, "write_checkpoint", damaged)
    with pytest.raises(ValueError, match="not the hooked one: its logits differ by"):
        ms.fold(embedded, ms.keep(meaning_svd, 9), tmp_path / "out", meaning)
    assert not any(tmp_path.iterdir())


# the folder


def put(target, content):
    """Put a small checkpoint in place, as `fold` does."""

    def write(folder):
        (folder / "model.safetensors").write_bytes(content)
        numbers = [torch.zeros(1).double()] * 6
        digest = hashlib.sha256(content).hexdigest()
        report = ms.FoldReport((SITE,), ("w",), *numbers, ("model.safetensors",), (digest,))
        report.save(folder / exports.REPORT)
        return report

    with exports._held(target):
        return exports._replace_folder(target, write)


@pytest.mark.fault(49)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes a fork")
@pytest.mark.parametrize("exchange", [True, False])
def test_a_fold_killed_at_any_step_leaves_the_old_one_whole_or_the_new_one(
    exchange, tmp_path, monkeypatch
):
    if not exchange:
        monkeypatch.setattr(exports, "_exchange", lambda *_: False)
    steps = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "ctypes.dlsym"}
    target, event, was_done = tmp_path / "out", 0, False
    while not was_done:
        put(target, b"old")
        was_done = finishes(partial(put, target, b"new"), event, steps)
        if exchange and sys.platform == "linux":
            assert exports._is_fold(target)
        with exports._held(target):  # as the next fold does
            assert exports._is_fold(target)
            assert (target / "model.safetensors").read_bytes() in (b"old", b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        event += 1
    assert event > 4
    assert (target / "model.safetensors").read_bytes() == b"new"


@pytest.mark.fault(29)
def test_a_second_process_cannot_fold_into_the_same_folder(
    embedded, meaning, meaning_svd, tmp_path
):
    target = tmp_path / "out"
    with exports._held(target), pytest.raises(RuntimeError, match="out is in use by another run"):
        ms.fold(embedded, ms.keep(meaning_svd, 9), target, meaning)
    assert not any(tmp_path.iterdir())


@pytest.mark.fault(30)
def test_a_full_disk_leaves_the_earlier_fold_whole_and_nothing_else(
    embedded, meaning, meaning_svd, tmp_path
):
    resource = pytest.importorskip("resource")  # not on Windows
    target, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    put(target, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="Cannot write a checkpoint to .*: .*File too large.* choose another"
        ):
            ms.fold(embedded, ms.keep(meaning_svd, 9), target, meaning)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exports._is_fold(target)
    assert (target / "model.safetensors").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(49, 30)
def test_an_earlier_fold_is_replaced_whole_and_nothing_else_is(
    embedded, meaning, meaning_svd, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    first = ms.fold(embedded, ms.keep(meaning_svd, 9), out, meaning)
    second = ms.fold(embedded, ms.keep(meaning_svd, 10), str(out), meaning)
    assert first.sha256 != second.sha256
    assert ms.FoldReport.load(out / exports.REPORT).sha256 == second.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(exports, "checkpoint_logits", stopped)
        with pytest.raises(KeyboardInterrupt):
            ms.fold(embedded, ms.keep(meaning_svd, 11), out, meaning)
    assert ms.FoldReport.load(out / exports.REPORT).sha256 == second.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files that `fold` did not write"):
        ms.fold(embedded, ms.keep(meaning_svd, 9), out, meaning)
    (out / "notes.txt").unlink()
    weights = load_file(out / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, out / "model.safetensors")
    with pytest.raises(FileExistsError, match="changed since"):  # trained on there
        ms.fold(embedded, ms.keep(meaning_svd, 9), out, meaning)
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        ms.fold(embedded, ms.keep(meaning_svd, 9), tmp_path / "no" / "out", meaning)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files"):
        ms.fold(embedded, ms.keep(meaning_svd, 9), tmp_path / "file", meaning)


def test_the_default_text_is_read_by_the_model(embedded, meaning_svd, tmp_path):
    report = ms.fold(embedded, ms.keep(meaning_svd, 64), tmp_path / "out")
    assert len(report.difference) == 1
    assert len(report.source.tokens[0]) > 40
    assert (
        len(
            ms.fold(
                embedded, ms.keep(meaning_svd, 64), tmp_path / "out", [tiny_task()] * 2
            ).to_pandas()
        )
        == 2
    )


def test_many_folds_leave_nothing_behind_in_transformer_lens(embedded, meaning_svd, tmp_path):
    def notes():
        points = (getattr(p, "hook_conversion", None) for p in embedded.hook_dict.values())
        return sum(len(getattr(point, "_conversion_state", ())) for point in points)

    before = notes()
    for _ in range(2):
        ms.fold(embedded, ms.keep(meaning_svd, 3), tmp_path / "model")
        ms.collect_writes(embedded, ms.Task.from_text(embedded, "We think", " so"))
    assert notes() == before
