import random
import re

import pytest
import torch

import mechsvd as ms
from mechsvd.demo import WEIGHTS
from mechsvd.demo.dictionary import DICTIONARY
from mechsvd.demo.language import SHAPES, is_grammatical, write
from mechsvd.demo.train import held_out_loss, train_tokenizer, translation_accuracy


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(
        WEIGHTS, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(WEIGHTS)


def test_what_the_language_writes_is_grammatical_and_what_it_does_not_is_not():
    rng = random.Random(0)
    for shape in SHAPES:
        text, nats = write(shape, rng)
        assert is_grammatical(text, shape)
        assert nats > 5
        assert not any(is_grammatical(text, other) for other in SHAPES if other != shape)
        assert not is_grammatical(text.replace(" ", "  ", 1), shape)
        assert not is_grammatical(text + " and so on", shape)
    assert not is_grammatical("Translate English to French:\n\ncheese => pain", "translation")


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(1)
    return {shape: [write(shape, rng)[0] for _ in range(2000)] for shape in SHAPES}


def test_the_text_cannot_be_memorised_whole(texts):
    everything = [text for written in texts.values() for text in written]
    assert len(set(everything)) > 0.99 * len(everything) == 0.99 * 8000


def test_the_vocabulary_is_a_few_hundred_words_besides_the_dictionary(texts):
    words = {
        word
        for shape in SHAPES[:3]
        for text in texts[shape]
        for word in re.findall(r"[a-z']+", text.lower())
    }
    assert 300 < len(words) < 700
    assert len(DICTIONARY) > 200


@pytest.mark.parametrize(("name", "shape"), list(zip(ms.SHORTFORM_PROMPTS, SHAPES, strict=True)))
def test_greedy_continuations_of_the_four_prompts_are_grammatical_text_of_their_kind(
    embedded, name, shape
):
    task = ms.Task.from_text(embedded, ms.SHORTFORM_PROMPTS[name], max_new_tokens=120)
    text = "".join(task.text())
    assert text.startswith("<s>")
    assert text.endswith("</s>"), "the text must come to an end"
    assert is_grammatical(text.removeprefix("<s>").removesuffix("</s>"), shape), text


def test_nearly_every_word_of_the_dictionary_is_translated_after_unseen_examples(hugging_face):
    assert translation_accuracy(*hugging_face) >= 0.95


def test_the_held_out_loss_is_the_model_cards_and_close_to_the_languages_own(hugging_face):
    loss = held_out_loss(*hugging_face)
    card = (WEIGHTS / "README.md").read_text()
    assert f"held-out loss {loss.model:.3f}" in card
    assert loss.language < loss.model < 1.05 * loss.language


def test_it_is_small_and_in_half_precision():
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 3_000_000
    weights = load_file(WEIGHTS / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert 1_000_000 <= sum(tensor.numel() for tensor in weights.values()) <= 1_500_000


def test_the_tokenizer_gives_every_text_back(hugging_face):
    tokenizer = train_tokenizer(random.Random("other"), texts=200)
    for text in ("menthe poivrée\n\nœuf", "anything at all: 日本 ☃"):
        for each in (tokenizer, hugging_face[1]):
            assert each.decode(each(text).input_ids, skip_special_tokens=True) == text
