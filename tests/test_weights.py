"""The directions of weights, against the Hugging Face modules and against what is written."""

import pytest
import torch

import mechsvd as ms
from mechsvd.engine.weights import weight_svd
from tests.conftest import ACCEPTED, tiny, tiny_hf, tiny_task

POST_NORM = ("Gemma-2", "OLMo-2")


def output_modules(hf_model):
    """By TransformerLens's pattern: the Hugging Face modules that write, layer by layer."""
    owner = {
        "GPT2LMHeadModel": lambda layer: (layer.attn.c_proj, layer.mlp.c_proj),
        "LlamaForCausalLM": lambda layer: (layer.self_attn.o_proj, layer.mlp.down_proj),
        "GPTNeoXForCausalLM": lambda layer: (layer.attention.dense, layer.mlp.dense_4h_to_h),
        "OPTForCausalLM": lambda layer: (layer.self_attn.out_proj, layer.fc2),
    }[type(hf_model).__name__]
    decoder = hf_model.get_decoder() if hasattr(hf_model, "get_decoder") else hf_model.base_model
    layers = getattr(decoder, "layers", None) or decoder.h
    attn, mlp = zip(*map(owner, layers), strict=True)
    return {"blocks.*.attn.o.weight": attn, "blocks.*.mlp.out.weight": mlp}


def written(module):
    """What each input of a module writes, found by running it on unit vectors: the oracle."""
    module = module.double()
    inputs = module.in_features if isinstance(module, torch.nn.Linear) else module.weight.shape[0]
    with torch.no_grad():
        zero = torch.zeros(1, inputs, dtype=torch.float64)
        return module(torch.eye(inputs, dtype=torch.float64)) - module(zero)


def projector(basis):
    return basis.double() @ basis.double().T


def assert_svd_of(svd, vectors):
    """The singular values, directions and `left` of a sample of vectors, in float64 from torch."""
    _, sizes, directions = torch.linalg.svd(vectors, full_matrices=False)
    torch.testing.assert_close(
        svd.singular_values.double(), sizes[: svd.rank], rtol=1e-5, atol=1e-6
    )
    assert float(sizes[svd.rank :].sum()) < 1e-5
    for k in {1, svd.rank // 2, svd.rank}:
        if k == svd.rank or sizes[k - 1] - sizes[k] > 1e-2:
            torch.testing.assert_close(
                projector(svd.directions[:, :k]), projector(directions[:k].T), rtol=0, atol=1e-4
            )
    flat = svd.left.reshape(-1, svd.rank).double()
    again = flat * svd.singular_values.double() @ svd.directions.double().T
    torch.testing.assert_close(again, vectors, rtol=0, atol=1e-5)


def with_low_rank(architecture, rank=3):
    """A tiny model whose output weights have rank 3, exactly in float32."""
    generator = torch.Generator().manual_seed(7)
    hf_model = tiny_hf(architecture)
    for parameter in (p for name, p in hf_model.named_parameters() if _is_output(name, p)):
        rows, columns = parameter.shape
        draw = lambda *shape: torch.randint(-3, 4, shape, generator=generator)
        product = draw(rows, rank) @ draw(rank, columns)
        parameter.data = product.to(parameter.dtype) / 8
    return hf_model


def _is_output(name, parameter):
    outputs = {"o_proj", "out_proj", "c_proj", "down_proj", "dense", "dense_4h_to_h"}
    return parameter.ndim == 2 and name.split(".")[-2] in outputs | {"fc2", "fc_out"}


@pytest.mark.parametrize("pattern", ["blocks.*.attn.o.weight", "blocks.*.mlp.out.weight"])
def test_a_trained_model_has_the_svd_of_its_hugging_face_weights(real, pattern):
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(real.directory, dtype=torch.float64)
    # torch.nn.Linear keeps [out, in]: its columns are what it writes
    columns = [module.weight.detach().T for module in output_modules(hf_model)[pattern]]
    svd = weight_svd(real.model, pattern)
    assert svd.left.shape[:2] == (real.n_layers, len(columns[0]))
    assert_svd_of(svd, torch.cat(columns))
    for layer, vectors in enumerate(columns):
        assert_svd_of(weight_svd(real.model, pattern.replace("*", str(layer))), vectors)


@pytest.mark.parametrize("architecture", ["GPT-2", "Llama", "GPT-NeoX", "OPT"])
@pytest.mark.parametrize("pattern", ["blocks.*.attn.o.weight", "blocks.*.mlp.out.weight"])
def test_the_output_axis_is_that_of_the_module_also_where_the_weight_is_square(
    architecture, pattern
):
    modules = output_modules(tiny_hf(architecture))[pattern]
    model = tiny(architecture)
    for layer, module in enumerate(modules):
        svd = weight_svd(model, pattern.replace("*", str(layer)))
        assert svd.left.shape[0] == 1
        assert_svd_of(svd, written(module))
        _assert_turned_would_differ(svd, module)


def _assert_turned_would_differ(svd, module):
    """The test would fail of a square weight that is turned."""
    weight = module.weight.detach().double()
    if weight.shape[0] == weight.shape[1]:
        vectors = written(module)
        turned = torch.linalg.svd(vectors.T)[2][:3].T
        assert (projector(turned) - projector(svd.directions[:, :3])).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["GPT-2", "Llama"])
@pytest.mark.parametrize("processed", [False, True])
def test_the_directions_are_those_of_transformer_lens_own_weights(architecture, processed):
    model = tiny(architecture)
    if processed:
        model.enable_compatibility_mode()
    for layer in range(2):
        attn, mlp = model.blocks[layer].attn.W_O, model.blocks[layer].mlp.W_out
        for name, weight in (("attn.o", attn), ("mlp.out", mlp)):
            svd = weight_svd(model, f"blocks.{layer}.{name}.weight")
            assert_svd_of(svd, weight.detach().double().flatten(end_dim=-2))


@pytest.mark.parametrize("architecture", [a for a in ACCEPTED if a not in POST_NORM])
@pytest.mark.parametrize("component", ["attn", "mlp"])
def test_a_write_without_its_bias_lies_in_the_span_of_the_weight_of_its_layer(
    architecture, component
):
    model = tiny(architecture, with_low_rank(architecture))
    writes = ms.collect_writes(model, tiny_task(), components=[component])
    for layer, values in enumerate(writes.values):
        name = {"attn": "attn.o", "mlp": "mlp.out"}[component]
        svd = weight_svd(model, f"blocks.{layer}.{name}.weight")
        assert svd.rank == 3
        without_bias = values - values[:1]  # a bias is the same at every position
        outside = ms.ablate(svd)(without_bias)
        assert outside.norm() < 1e-5 * without_bias.norm()
        other = weight_svd(model, f"blocks.{1 - layer}.{name}.weight")
        assert ms.ablate(other)(without_bias).norm() > 0.1 * without_bias.norm()


@pytest.mark.parametrize("architecture", POST_NORM)
def test_a_norm_after_the_weight_takes_the_writes_out_of_its_span(architecture):
    model = tiny(architecture, with_low_rank(architecture))
    writes = ms.collect_writes(model, tiny_task(), components=["attn"])
    svd = weight_svd(model, "blocks.0.attn.o.weight")
    assert svd.rank == 3
    assert ms.ablate(svd)(writes.values[0]).norm() > 0.1 * writes.values[0].norm()


def test_writes_of_a_deficient_weight_overlap_its_directions_and_not_those_of_chance():
    model = tiny("Llama", with_low_rank("Llama"))
    writes = ms.collect_writes(model, tiny_task(), components=["attn"], layers=1)
    with pytest.warns(UserWarning, match="9 writes for 32 dimensions"):
        svd = ms.decompose(writes)
    weights = weight_svd(model, "blocks.1.attn.o.weight")
    overlap = ms.overlap([ms.span(svd.directions[:, :3]), weights.subspace(3)])
    assert float(overlap.values[0, 1]) == pytest.approx(3, abs=1e-4)
    assert float(overlap.expected[0, 1]) == pytest.approx(9 / 32)


@pytest.mark.parametrize("architecture", ["GPT-2", "Llama"])
def test_weights_of_unequal_width_become_one_site_with_all_their_columns(architecture):
    patterns = ["blocks.0.attn.o.weight", "blocks.1.mlp.out.weight"]
    model, hf_model = tiny(architecture), tiny_hf(architecture)
    attn, mlp = (output_modules(hf_model)[f"blocks.*.{n}.weight"] for n in ("attn.o", "mlp.out"))
    vectors = torch.cat([written(attn[0]), written(mlp[1])])
    svd = weight_svd(model, patterns)
    assert svd.left.shape[:2] == (1, len(vectors))
    assert_svd_of(svd, vectors)


def test_the_signs_are_those_of_the_house_and_the_weights_are_left_alone():
    model = tiny("GPT-2")
    before = {name: p.detach().clone() for name, p in torch.nn.Module.named_parameters(model)}
    svd = weight_svd(model, "blocks.*.mlp.out.weight")
    largest = svd.directions.gather(0, svd.directions.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    assert not svd.directions.requires_grad
    for name, parameter in torch.nn.Module.named_parameters(model):
        assert torch.equal(parameter, before[name])


@pytest.mark.fault(2)
def test_a_half_precision_weight_is_decomposed_as_it_is_and_given_in_single():
    model = tiny("Llama")
    vectors = torch.nn.Module.get_submodule(model, "blocks.0.attn.o").weight.detach().bfloat16()
    svd = weight_svd(model.to(torch.bfloat16), "blocks.0.attn.o.weight")
    assert svd.directions.dtype == torch.float32
    assert_svd_of(svd, vectors.double().T)


def test_a_decomposition_of_weights_belongs_to_its_model(real, tmp_path):
    svd = weight_svd(real.model, ["blocks.0.attn.o.weight", "blocks.1.attn.o.weight"])
    assert svd.source.notes == ("weights blocks.0.attn.o.weight, blocks.1.attn.o.weight",)
    assert (svd.source.hooks, svd.source.tokens, svd.layer) == ((), (), None)
    measured = ms.measure(real.model, real.task, ms.keep(svd.subspace(3)))
    assert measured.log_prob.isfinite().all()
    assert ms.overlap([svd.subspace(3), real.svd.subspace(3)]).values.shape == (2, 2)
    svd.save(tmp_path / "svd.safetensors")
    again = ms.Decomposition.load(tmp_path / "svd.safetensors")
    assert torch.equal(again.directions, svd.directions)
    other = tiny("Llama")
    with pytest.raises(ValueError, match="come from different models"):
        ms.measure(other, tiny_task(), ms.keep(weight_svd(tiny("GPT-2"), "*.o.weight").subspace(3)))


@pytest.mark.parametrize(
    ("architecture", "pattern", "message"),
    [
        ("GPT-2", "blocks.0.attn.o.bias", r"`blocks.0.attn.o.bias` of shape \[32\] is a bias"),
        ("GPT-2", "blocks.0.ln1.weight", r"of shape \[32\] is a bias or the gain of a norm"),
        ("GPT-2", "blocks.0.attn.q.weight", r"`blocks.0.attn.q.weight` of shape \[32, 32\] is not"),
        ("GPT-2", "blocks.0.*", r"stream: 'blocks\.\*\.attn\.o\.weight' or 'blocks\.\*\.mlp\.out"),
        ("Llama", "blocks.1.mlp.in.weight", r"\[64, 32\] is not what TransformerLens names"),
        ("Mamba", "*out_proj.weight", r"\[32, 64\] is not what .*: this model has none"),
        ("Llama", "embed.weight", r"`embed.weight` of shape \[256, 32\] is an embedding, which"),
        ("Llama", "unembed.weight", r"`unembed.weight` of shape \[256, 32\] is the unembedding"),
        ("GPT-2", "unembed.weight", r"`embed.weight` of shape \[256, 32\] is an embedding, which"),
        ("GPT-2", "pos_embed.weight", r"\[64, 32\] is an embedding, which starts"),
    ],
)  # fmt: skip
def test_a_weight_that_does_not_write_to_the_residual_stream_is_refused(
    architecture, pattern, message
):
    with pytest.raises(ValueError, match=message):
        weight_svd(tiny(architecture), pattern)


@pytest.mark.fault(13)
def test_a_pattern_without_a_match_is_refused_with_the_closest_names():
    with pytest.raises(KeyError, match=r"No weight matches 'blocks.9.attn.o.weight'"):
        weight_svd(tiny("Llama"), "blocks.9.attn.o.weight")


def test_a_weight_of_another_width_kind_type_or_with_nan_is_refused():
    def replaced(module):
        model = tiny("Llama")
        model.blocks[0].attn.o._modules["_original_component"] = module
        return model

    with pytest.raises(
        ValueError, match=r"`blocks.0.attn.o.weight` of shape \[48, 32\] writes vec"
    ):
        weight_svd(replaced(torch.nn.Linear(32, 48)), "blocks.0.attn.o.weight")
    with pytest.raises(ValueError, match=r"\[1, 32, 32\] belongs to a Bilinear, and which of its"):
        weight_svd(replaced(torch.nn.Bilinear(32, 32, 1)), "blocks.0.attn.o.weight")
    broken = torch.nn.Linear(32, 32)
    broken.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"of shape \[32, 32\] holds NaN or inf"):
        weight_svd(replaced(broken), "blocks.0.attn.o.weight")
    quantised = torch.nn.Linear(32, 32)
    quantised.weight = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="is torch.int8, so its numbers are not those"):
        weight_svd(replaced(quantised), "blocks.0.attn.o.weight")


@pytest.mark.older
@pytest.mark.parametrize("architecture", ["GPT-2", "Llama"])
def test_a_hooked_transformer_has_the_same_directions_and_its_writes_lie_in_their_span(
    architecture,
):
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        pytest.skip("HookedTransformer left TransformerLens with 4.0")
    from tests.test_older import hooked

    hf_model = with_low_rank(architecture)
    models = hooked(hf_model), tiny(architecture, hf_model)
    for own, name in (("attn.W_O", "attn.o.weight"), ("mlp.W_out", "mlp.out.weight")):
        old, new = (
            weight_svd(model, f"blocks.*.{n}") for model, n in zip(models, (own, name), strict=True)
        )
        torch.testing.assert_close(old.singular_values, new.singular_values)
        torch.testing.assert_close(projector(old.directions), projector(new.directions))
        torch.testing.assert_close(old.left.square().sum(-1), new.left.square().sum(-1))
        layer = weight_svd(models[0], f"blocks.1.{own}")
        component = [own.split(".")[0]]
        values = ms.collect_writes(models[0], tiny_task(), components=component, layers=1).values[0]
        without_bias = values - values[:1]
        assert layer.rank == 3
        assert ms.ablate(layer)(without_bias).norm() < 1e-5 * without_bias.norm()
    for name, message in (
        ("blocks.0.attn.W_Q", r"\[4, 32, 8\] is not what TransformerLens names"),
        ("blocks.0.attn.b_O", r"\[32\] is a bias"),
        ("embed.W_E", r"\[256, 32\] is an embedding"),
        ("unembed.W_U", r"\[32, 256\] is the unembedding"),
        ("blocks.0.mlp.W_in", r"stream: 'blocks\.\*\.attn\.W_O' or 'blocks\.\*\.mlp\.W_out'\."),
    ):
        with pytest.raises(ValueError, match=message):
            weight_svd(models[0], name)
