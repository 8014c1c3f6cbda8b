import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mechsvd as ms
from mechsvd.model.tasks import as_tasks, require_fitting
from tests.conftest import tiny


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A model whose tokenizer merges 'li' + 'ttle' into one token, with a space before words, as SentencePiece has it."""
    model = tiny("Llama")
    words = ["<unk>", "<s>", "▁li", "ttle", "▁little", "▁", *"litle▁"]
    merges = [("l", "i"), ("▁", "li"), ("t", "t"), ("l", "e"), ("tt", "le"), ("▁li", "ttle")]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*words, "li", "tt", "le"]))}
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model


def test_a_task_from_text_starts_with_bos_and_scores_the_continuation(embedded):
    task = ms.Task.from_text(embedded, "I believe the meaning of life is", " to find joy")
    assert int(task.tokens[0]) == embedded.tokenizer.bos_token_id
    assert task.text() == ("<s>I believe the meaning of life is", " to find joy")
    assert embedded.tokenizer.decode(task.continuation) == " to find joy"
    assert task.scored == slice(task.prompt_length - 1, len(task.tokens) - 1)
    joint = embedded.tokenizer("I believe the meaning of life is to find joy").input_ids
    assert task.tokens.tolist() == joint


def test_without_a_continuation_it_is_the_greedy_one(embedded):
    task = ms.Task.from_text(embedded, "I believe the meaning of life is", max_new_tokens=9)
    tokens = task.tokens[: task.prompt_length][None]
    for _ in range(9):  # one full forward pass a token, without a cache
        with torch.no_grad():
            tokens = torch.cat([tokens, embedded(tokens)[:, -1:].argmax(-1)], dim=1)
    assert task.tokens.tolist() == tokens[0].tolist()


def test_texts_begin_as_they_are_known_to(real):
    begins = {
        "embedded": " to find joy, but my sister says the secrets of learning are joy",
        "stories260k": " a little girl named Lily. She loved to play outside in the park.",
    }
    task = ms.Task.from_text(real.model, real.prompt, max_new_tokens=30)
    assert task.text()[1].startswith(begins[real.name])


def test_the_shortforms_prompts_are_ready_by_name():
    assert list(ms.SHORTFORM_PROMPTS) == ["meaning", "relativity", "launch", "translation"]
    assert ms.SHORTFORM_PROMPTS["launch"].startswith(
        "A brief message congratulating the team on the launch:\n\nHi everyone"
    )


@pytest.mark.fault(9)
def test_tokens_that_merge_across_the_boundary_warn_and_the_prompt_keeps_its_own(merging):
    own = merging.tokenizer.encode("li", add_special_tokens=False)
    with pytest.warns(UserWarning, match="Tokens merge across the boundary 'li' \\+ 'ttle'"):
        task = ms.Task.from_text(merging, "li", "ttle")
    assert task.tokens[: task.prompt_length].tolist() == [merging.tokenizer.bos_token_id, *own]
    assert merging.tokenizer.convert_ids_to_tokens(task.continuation.tolist()) == [
        "ttle"
    ]  # and no space before it


@pytest.mark.fault(6)
def test_text_that_is_not_text_or_empty_is_refused_before_the_model_runs(embedded):
    with pytest.raises(ValueError, match="`prompt` is empty"):
        ms.Task.from_text(embedded, "")
    with pytest.raises(ValueError, match="`continuation` is empty"):
        ms.Task.from_text(embedded, "I believe", "")
    with pytest.raises(ValueError, match="Nothing to score: `max_new_tokens` is 0"):
        ms.Task.from_text(embedded, "I believe", max_new_tokens=0)
    with pytest.raises(TypeError, match="prompt"):
        ms.Task.from_text(embedded, None)


@pytest.mark.fault(8, 11)
def test_token_ids_are_checked_before_the_forward_pass(embedded):
    with pytest.raises(
        ValueError, match="Token ids run from 0 to 1024, but the model has 0 to 1023"
    ):
        ms.collect_writes(embedded, ms.Task(tokens=torch.tensor([0, 5, 1024]), prompt_length=1))
    with pytest.raises(ValueError, match="Nothing to score"):
        ms.Task(tokens=torch.tensor([0, 5]), prompt_length=2)
    with pytest.raises(ValueError, match="at least one token"):
        ms.Task(tokens=torch.tensor([0, 5]), prompt_length=0)
    with pytest.raises(TypeError, match="tokens"):
        ms.Task(tokens=torch.tensor([0.0, 5.0]), prompt_length=1)
    with pytest.raises((ValueError, TypeError), match="tokens"):
        ms.Task(tokens=torch.tensor([[0, 5]]), prompt_length=1)


@pytest.mark.fault(7)
def test_too_long_a_task_is_refused_with_both_lengths_or_cut_on_request(embedded):
    prompt = "Every day is a gift. " * 60
    with pytest.raises(
        ValueError,
        match=r"The prompt has \d+ tokens and the continuation 40, but the context holds 256",
    ):
        ms.Task.from_text(embedded, prompt)
    with pytest.warns(UserWarning, match="oldest tokens of the prompt were dropped"):
        task = ms.Task.from_text(embedded, prompt, max_new_tokens=5, truncate="left")
    assert task.prompt_length == 251
    assert int(task.tokens[0]) == embedded.tokenizer.bos_token_id
    with pytest.raises(
        ValueError, match="The task has 300 tokens, but the model's context holds 256"
    ):
        require_fitting(
            embedded, ms.Task(tokens=torch.zeros(300, dtype=torch.long), prompt_length=5)
        )


@pytest.mark.fault(10)
def test_two_or_no_bos_tokens_warn(embedded):
    with pytest.warns(UserWarning, match="The text starts with BOS twice"):
        ms.Task.from_text(embedded, "<s>I believe", " it")
    with pytest.warns(UserWarning, match="no BOS token, though the model has one"):
        task = ms.Task.from_text(embedded, "I believe", " it", prepend_bos=False)
    with pytest.warns(UserWarning, match="The text starts with no BOS token"):
        require_fitting(embedded, task)
    assert "<s>" not in repr(task)


@pytest.mark.fault(10)
def test_bos_is_prepended_where_transformerlens_would_and_checked_by_its_number(
    embedded, monkeypatch
):
    monkeypatch.setattr(
        embedded.cfg, "default_prepend_bos", False
    )  # Qwen2, whose tokenizer has no BOS of its own
    assert ms.Task.from_text(
        embedded, "I believe", " it"
    ).tokens.tolist() == embedded.tokenizer.encode("I believe it", add_special_tokens=False)
    monkeypatch.setattr(embedded.cfg, "default_prepend_bos", True)
    with pytest.warns(UserWarning, match="no BOS token"):
        require_fitting(embedded, ms.Task(tokens=torch.tensor([5, 6, 7]), prompt_length=1))
    with pytest.warns(UserWarning, match="BOS twice"):
        require_fitting(embedded, ms.Task(tokens=torch.tensor([0, 0, 7]), prompt_length=1))


def test_characters_of_several_tokens_are_shown_whole(embedded):
    task = ms.Task.from_text(embedded, "日本 is ☃ nice", " 😀 ok")
    assert task.text() == ("<s>日本 is ☃ nice", " 😀 ok")
    assert "�" not in repr(task)


def test_a_model_without_a_tokenizer_says_how_to_go_on():
    model = tiny("Llama")
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"no tokenizer.*Task\(tokens=…"):
        ms.Task.from_text(model, "I believe")


def test_lists_of_tasks_are_checked(embedded):
    with pytest.raises(ValueError, match="the list is empty"):
        as_tasks([])
    with pytest.raises(TypeError, match="Task 1 is str 'I believe'"):
        as_tasks.__wrapped__([ms.Task(tokens=torch.tensor([0, 5]), prompt_length=1), "I believe"])


def test_a_task_prints_itself_and_gives_a_table(meaning):
    assert len(repr(meaning).splitlines()) == 3
    table = meaning.to_pandas()
    assert table["scored"].sum() == len(meaning.continuation)
    assert "".join(table["text"]) == "".join(meaning.text())
