"""Greedy text stops, and avoids tokens, where transformers' `generate` does."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import mechsvd as ms
from mechsvd.demo import WEIGHTS
from mechsvd.model import decoding
from tests.conftest import STORIES

pytestmark = pytest.mark.older
PROMPT = "I believe the meaning of life is"
# of a checkpoint's generation_config.json; 855 is " but" of the embedded model
SETTINGS = {
    "two end tokens": {"eos_token_id": [1, 855]},
    "no end token": {"eos_token_id": None},
    "suppressed tokens": {"suppress_tokens": [266, 855, 5]},
    "suppressed at the beginning": {"begin_suppress_tokens": [279, 283, 291]},
    "a forced end": {"forced_eos_token_id": 855},
    "a forced beginning": {"forced_bos_token_id": 17},
    "a penalty of repetition": {"repetition_penalty": 1.8},
    "no repeated tokens": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[855], [266, 291]]},
    "a least length": {"eos_token_id": [1, 855], "min_length": 18},
    "least new tokens": {"eos_token_id": [1, 855], "min_new_tokens": 11},
    "a decay of length": {
        "eos_token_id": [1, 855],
        "exponential_decay_length_penalty": [2, 1.5],
    },
    "a bias": {"sequence_bias": [[[266], -20.0], [[855], 5.0]]},
    "settings of drawn text": {"do_sample": True, "temperature": 0.2, "top_k": 3, "top_p": 0.5},
    "a cache of another kind": {"cache_implementation": "static"},
}


def checkpoint(folder, settings, source=WEIGHTS):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "generation_config.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**kept, **settings}), encoding="utf-8")
    return str(folder)


def generated(directory, tokens, count, **options):
    plain = AutoModelForCausalLM.from_pretrained(directory)
    return plain.generate(tokens[None], max_new_tokens=count, do_sample=False, **options)[
        0
    ].tolist()


@pytest.mark.fault(55)
@pytest.mark.parametrize("name", SETTINGS)
def test_text_is_that_of_generate_under_each_setting(name, embedded, plain, monkeypatch):
    free = ms.Task.from_text(embedded, PROMPT, max_new_tokens=20)
    config = copy.deepcopy(embedded.original_model.generation_config)
    config.update(**SETTINGS[name])
    monkeypatch.setattr(embedded.original_model, "generation_config", config)
    task = ms.Task.from_text(embedded, PROMPT, max_new_tokens=20)
    start = task.tokens[: task.prompt_length]
    plain.generation_config = config
    expected = plain.generate(start[None], max_new_tokens=20, do_sample=False)[0]
    assert task.tokens.tolist() == expected.tolist()
    changes_text = "drawn" not in name and "cache" not in name
    if changes_text and name not in ("no end token", "a forced beginning"):
        assert task.tokens.tolist() != free.tokens.tolist()
    (uncached,) = ms.generate_tasks(embedded, start, [None], max_new_tokens=20, use_kv_cache=False)
    assert uncached.tokens.tolist() == task.tokens.tolist()


@pytest.mark.fault(55)
def test_the_settings_of_a_checkpoint_are_read(tmp_path):
    directory = checkpoint(tmp_path, SETTINGS["two end tokens"])
    task = ms.Task.from_text(ms.load_model(directory), PROMPT, max_new_tokens=20)
    start = task.tokens[: task.prompt_length]
    assert task.tokens.tolist() == generated(directory, start, 20)
    assert len(task.continuation) == 6


@pytest.mark.fault(55)
def test_a_forced_beginning_holds_after_bos_alone(tmp_path):
    settings = {"forced_bos_token_id": 17, "begin_suppress_tokens": [266, 20]}
    directory = checkpoint(tmp_path, settings)
    (task,) = ms.generate_tasks(
        ms.load_model(directory), torch.tensor([0]), [None], max_new_tokens=6
    )
    assert task.tokens[1] == 17
    assert task.tokens.tolist() == generated(directory, torch.tensor([0]), 6)


@pytest.mark.fault(55)
@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260k is not beside the project")
@pytest.mark.parametrize("name", ["suppressed tokens", "no repeated tokens", "a decay of length"])
def test_a_real_checkpoint_writes_what_generate_does(tmp_path, name):
    ends = {"eos_token_id": [2, 400], "suppress_tokens": [262]}
    directory = checkpoint(tmp_path, SETTINGS[name] | ends, STORIES)
    start = torch.tensor([1])
    (task,) = ms.generate_tasks(ms.load_model(directory), start, [None], max_new_tokens=30)
    assert task.tokens.tolist() == generated(directory, start, 30)


@pytest.mark.fault(55)
def test_text_ends_at_a_string_that_ends_it(tmp_path, embedded):
    directory = checkpoint(tmp_path, {"stop_strings": [" sister"]})
    task = ms.Task.from_text(ms.load_model(directory), PROMPT, max_new_tokens=20)
    start = task.tokens[: task.prompt_length]
    assert task.tokens.tolist() == generated(directory, start, 20, tokenizer=embedded.tokenizer)
    assert task.text()[1].endswith(" sister")


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("num_beams", 3), ("guidance_scale", 1.5), ("token_healing", True), ("max_time", 9.0)],
        # 0 and 1 ask for nothing only where transformers takes them so
        *[("max_time", 0.0), ("max_time", 1), ("guidance_scale", 0), ("penalty_alpha", 1.0)],
        ("encoder_no_repeat_ngram_size", 1),
    ],
)
def test_a_setting_that_is_not_honoured_is_refused_by_name(embedded, monkeypatch, field, value):
    monkeypatch.setattr(embedded.original_model.generation_config, field, value, raising=False)
    with pytest.raises(
        ValueError, match=rf"`{field}` = {value}.*generation_config\.{field} = None"
    ):
        ms.Task.from_text(embedded, PROMPT, max_new_tokens=3)


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    "ends",
    [torch.tensor(855), np.int64(855), np.array([1, 855]), torch.tensor([1, 855]), (855,)],
)
def test_end_tokens_in_any_form_end_a_text(embedded, monkeypatch, ends):
    monkeypatch.setattr(embedded.original_model.generation_config, "eos_token_id", ends)
    assert ms.Task.from_text(embedded, PROMPT, max_new_tokens=20).tokens[-1] == 855


# what neither changes greedy text nor is a length that every call gives itself
WITHOUT_EFFECT = {
    *("max_length", "max_new_tokens", "do_sample", "use_cache", "cache_implementation"),
    *("cache_config", "max_cache_len", "early_stopping", "use_mtp", "prefill_chunk_size"),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "length_penalty", "renormalize_logits", "remove_invalid_values"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "speculation_type"),
    *("assistant_ensemble_weight", "compile_config", "disable_compile", "low_memory"),
    *("continuous_batching_config", "_from_model_config", "transformers_version"),
    *("diversity_penalty", "num_beam_groups"),  # of beams, which are refused
}


@pytest.mark.fault(55)
def test_every_field_is_honoured_refused_or_without_effect():
    ours = {"eos_token_id", "stop_strings", *decoding._HONOURED, *decoding._REFUSED}
    assert not ours & WITHOUT_EFFECT
    assert {*GenerationConfig().to_dict()} <= ours | WITHOUT_EFFECT


def test_rows_that_end_at_different_steps_are_each_cut_at_their_end(
    embedded, meaning_svd, monkeypatch
):
    monkeypatch.setattr(embedded.original_model.generation_config, "eos_token_id", [1, 855])
    edits = [None, ms.keep(meaning_svd, 5)]
    both = ms.generate_tasks(embedded, PROMPT, edits, max_new_tokens=15)
    alone = [ms.generate_tasks(embedded, PROMPT, [e], max_new_tokens=15)[0] for e in edits]
    assert [t.tokens.tolist() for t in both] == [t.tokens.tolist() for t in alone]
    assert len(both[0].tokens) != len(both[1].tokens)
