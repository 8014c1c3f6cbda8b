"""Gradients over the checkpoints that the demo's training writes, run for real on a small model."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mechsvd as ms
from mechsvd.demo.train import CONTEXT, held_out_loss, train, train_tokenizer
from mechsvd.model.sites import find_weights

STEPS = (0, 12, 60)
OVER = "blocks.1.mlp.*"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with three checkpoints of a small model, its tokenizer, and the model itself."""
    folder = tmp_path_factory.mktemp("training")
    tokenizer = train_tokenizer(random.Random("checkpoints"), texts=300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    rng = random.Random("rows")
    train(model, tokenizer, rng, steps=60, rows=4, checkpoints=STEPS, directory=folder)
    return folder, tokenizer, model


@pytest.fixture(scope="module")
def checkpoints(trained):
    folder, _, _ = trained
    assert {path.name for path in folder.iterdir()} == {f"step-{step}" for step in STEPS}
    return [ms.load_model(folder / f"step-{step}", device="cpu") for step in STEPS]


@pytest.fixture(scope="module")
def task(checkpoints):
    return ms.Task.from_text(checkpoints[-1], "I believe the", " meaning of life is to find joy.")


def test_the_checkpoints_are_those_of_the_training(trained, checkpoints):
    _, tokenizer, model = trained
    final = dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"]
    ((_, stored),) = find_weights(checkpoints[-1], ["blocks.1.mlp.out.weight"]).values()
    torch.testing.assert_close(stored, final, rtol=0, atol=0)
    losses = []
    for step in STEPS:
        raw = LlamaForCausalLM.from_pretrained(trained[0] / f"step-{step}").eval()
        losses.append(held_out_loss(raw, tokenizer, texts=5).model)
    assert losses[0] > losses[1] + 0.3 > losses[2] + 0.6  # it learns


def test_a_gradient_basis_of_training_holds_the_gradients_of_every_checkpoint(checkpoints, task):
    collected = [ms.collect_gradients(model, task, OVER) for model in checkpoints]
    assert len({gradients.over for gradients in collected}) == 1
    basis = ms.gradient_basis(collected)
    rows = torch.cat([gradients.values for gradients in collected]).double()
    assert basis.rank == min(rows.shape) == 3 * len(task.continuation)
    gram = rows @ rows.T / len(rows)  # it has the eigenvalues of the second moment
    values = torch.linalg.eigvalsh(gram).flip(0)
    torch.testing.assert_close(basis.eigenvalues.double(), values, rtol=1e-3, atol=1e-9)
    v = basis.directions.double()
    torch.testing.assert_close(rows @ v @ v.T, rows, rtol=0, atol=2e-4 * float(rows.abs().max()))
    # a checkpoint's gradients alone are another basis: training turns them
    last = ms.gradient_basis(collected[-1])
    inside = (last.directions.double().T @ rows[: len(collected[0])].T).square().sum()
    assert float(inside / rows[: len(collected[0])].square().sum()) < 0.5


def test_each_checkpoints_gradients_are_finite_differences_of_its_own_run(checkpoints, task):
    for model in checkpoints:
        found = ms.collect_gradients(model, task, "blocks.1.ln2.weight")
        ((_, weight),) = find_weights(model, ["blocks.1.ln2.weight"]).values()
        clean = weight.detach().clone()
        for entry in (0, 17):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[entry] = clean[entry] + sign * 3e-2
                    logits = model(task.tokens[None], return_type="logits")[0, task.scored]
                    weight.copy_(clean)
                log_probs = logits.double().log_softmax(-1)
                ends.append(log_probs.gather(-1, task.continuation[:, None])[:, 0])
            slope = (ends[0] - ends[1]) / 6e-2
            expected = found.values[:, entry].double()
            torch.testing.assert_close(slope, expected, rtol=3e-2, atol=1e-3)


def test_the_basis_of_training_is_scored_next_to_the_hessians(checkpoints, task, silent):
    model = checkpoints[-1]
    basis = ms.gradient_basis([ms.collect_gradients(m, task, OVER) for m in checkpoints])
    found = ms.hessian_attribution(
        model, task, OVER, objective="log_prob", basis="from_w", pairs=8, path_steps=4,
        bases={"training": basis},
    )  # fmt: skip
    scored = found.bases["training"]
    assert len(scored) == basis.rank
    # the gradient at the end lies in the span of the gradients of its tokens
    gradient = ms.collect_gradients(model, task, OVER).values.double().sum(dim=0)
    assert float(scored.slopes.norm()) == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert 0 < float(scored.held.sum()) < 1
    pairs = ms.interactions(model, task, OVER, found, rows=5, draws=3)
    assert pairs.names == ("Hessian", "training")
    assert pairs.interaction.isfinite().all()
    svd = ms.decompose(ms.collect_writes(model, task))
    gains = [ms.collect_gradients(m, task, svd, check=False) for m in checkpoints]  # one w for all
    assert ms.gradient_basis(gains).rank == min(len(gains[0].values[0]), 3 * len(gains[0]))


def test_a_step_beyond_the_training_is_refused(trained, tmp_path):
    _, tokenizer, model = trained
    with pytest.raises(ValueError, match=r"`checkpoints` holds \[9\], but training has steps 0 to"):
        train(model, tokenizer, random.Random(0), steps=2, checkpoints=[1, 9], directory=tmp_path)
    assert not any(tmp_path.iterdir())
