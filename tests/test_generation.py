import pytest
import torch

import mechsvd as ms
from mechsvd.model.decoding import continue_tokens
from mechsvd.model.evaluation import other_hooks
from tests.conftest import ACCEPTED, tiny, tiny_task

PROMPT = ms.SHORTFORM_PROMPTS["meaning"]


def slow_greedy(model, tokens, edit_at, steps):
    """The oracle: one plain `run_with_hooks` over the whole text for each new token, without a cache."""
    tokens, names = tokens.clone(), [site.hook_name for site in ms.find_sites(model)]
    for _ in range(steps):
        hooks = [
            (
                name,
                lambda x, hook: torch.stack([edit_at(x[0, i], i) for i in range(x.shape[1])])[None],
            )
            for name in names
        ]
        with torch.no_grad():
            logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)
        tokens = torch.cat([tokens, logits[0, -1].argmax()[None]])
    return tokens


@pytest.mark.parametrize("prompt", ["its own", "The cat", ""])
@pytest.mark.parametrize("rank", ["nearly all", 40, 0])
def test_the_text_is_that_of_a_plain_loop_without_a_cache(real, prompt, rank):
    rank = real.d_model - 4 if rank == "nearly all" else rank
    kept = real.svd.directions[:, :rank]
    nothing = ms.gate(real.svd, torch.zeros(real.svd.rank))
    edit = ms.keep(real.svd.subspace(rank)) if rank else nothing
    text = real.prompt if prompt == "its own" else prompt
    (task,) = ms.generate_tasks(real.model, text, [edit], max_new_tokens=8)
    start = task.tokens[: task.prompt_length]
    assert start[0] == real.model.tokenizer.bos_token_id
    expected = slow_greedy(
        real.model, start, lambda x, i: kept @ (kept.T @ x), len(task.continuation)
    )
    assert task.tokens.tolist() == expected.tolist()


def test_without_an_edit_and_with_everything_kept_it_is_the_greedy_text(
    embedded, meaning, meaning_svd
):
    clean = ms.generate(embedded, PROMPT, max_new_tokens=12)
    assert clean == PROMPT + meaning.text()[1]
    assert (
        ms.generate(embedded, PROMPT, ms.keep(meaning_svd.subspace(128)), max_new_tokens=12)
        == clean
    )
    assert ms.generate(embedded, PROMPT, None, max_new_tokens=12) == clean


def test_several_edits_in_one_call_write_what_each_writes_alone(embedded, meaning_svd):
    edits = [
        None,
        *(ms.keep(meaning_svd.subspace(rank)) for rank in (110, 60, 20)),
        ms.shift(torch.ones(128)),
    ]
    together = ms.generate(embedded, PROMPT, edits, max_new_tokens=10)
    assert together == [ms.generate(embedded, PROMPT, edit, max_new_tokens=10) for edit in edits]
    stack = ms.gate(meaning_svd, (torch.arange(128) < torch.tensor([[110], [60], [20]])).float())
    assert ms.generate(embedded, PROMPT, stack, max_new_tokens=10) == together[1:4]


@pytest.mark.fault(20)
@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_the_cache_changes_nothing_and_positions_are_absolute(embedded, meaning_svd, prompt):
    chosen, drop = [0, 3, 11, 14] if prompt else [0, 3, 8], ms.ablate(meaning_svd.subspace(30))
    options = {"max_new_tokens": 9, "positions": chosen}
    (cached,) = ms.generate_tasks(embedded, prompt, [drop], **options)
    (plain,) = ms.generate_tasks(embedded, prompt, [drop], use_kv_cache=False, **options)
    expected = slow_greedy(
        embedded,
        cached.tokens[: cached.prompt_length],
        lambda x, i: drop(x[None])[0] if i in chosen else x,
        9,
    )
    assert (
        cached.tokens.tolist() == plain.tokens.tolist() == expected.tolist()[: len(cached.tokens)]
    )


def test_drawn_text_depends_on_the_seed_alone(embedded, meaning_svd):
    kept = ms.keep(meaning_svd.subspace(110))
    options = {"max_new_tokens": 8, "temperature": 1.5}
    state = torch.random.get_rng_state()
    first = ms.generate(embedded, PROMPT, [None, kept], seed=3, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert (
        ms.generate(embedded, PROMPT, [kept, None], seed=3, **options) == first[::-1]
    )  # nor on what stands beside it
    assert ms.generate(embedded, PROMPT, kept, seed=3, **options) == first[1]
    assert ms.generate(embedded, PROMPT, seed=4, **options) != first[0]


def test_the_hotter_the_more_surprising(embedded):
    options = {"max_new_tokens": 15}
    tasks = [
        ms.generate_tasks(embedded, PROMPT, [None], temperature=t, seed=0, **options)[0]
        for t in (0.0, 1.0, 3.0)
    ]
    surprises = [
        -float(ms.measure(embedded, task, [ms.chain()]).log_probs.mean()) for task in tasks
    ]
    assert surprises == sorted(surprises)


def test_what_an_edit_wrote_can_be_measured(embedded, meaning_svd):
    edit = ms.keep(meaning_svd.subspace(60))
    (task,) = ms.generate_tasks(embedded, PROMPT, [edit], max_new_tokens=10)
    assert ms.measure(embedded, task, [edit]).is_greedy.all()
    assert not ms.measure(embedded, task, [ms.chain()]).is_greedy.all()


def test_text_ends_at_the_end_of_text_which_is_not_shown(embedded, monkeypatch):
    (free,) = ms.generate_tasks(embedded, PROMPT, [None], max_new_tokens=12)
    end = int(free.tokens[free.prompt_length + 5])
    first = free.continuation.tolist().index(end)
    monkeypatch.setattr(embedded.original_model.generation_config, "eos_token_id", end)
    ended, other = ms.generate_tasks(
        embedded, PROMPT, [None, ms.ablate(torch.eye(128)[:, :1])], max_new_tokens=12
    )
    assert ended.tokens.tolist() == free.tokens[: free.prompt_length + first + 1].tolist()
    assert end not in other.continuation[:-1].tolist()
    text = ms.generate(embedded, PROMPT, max_new_tokens=12)
    assert text == PROMPT + "".join(free.pieces[free.prompt_length : free.prompt_length + first])


@pytest.mark.older
@pytest.mark.parametrize("architecture", ACCEPTED)
def test_every_architecture_generates_what_a_loop_does(architecture, silent):
    model, start = tiny(architecture), tiny_task(length=5, prompt_length=4).tokens
    kept = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(0)))[0]
    hooks, theirs = ms.fwd_hooks(model, ms.keep(kept), positions=[1, 3, 6, 7]), other_hooks(model)
    longer = continue_tokens(model, start[None], 6, hooks)[0]
    expected = slow_greedy(
        model, start, lambda x, i: kept @ (kept.T @ x) if i in (1, 3, 6, 7) else x, len(longer) - 5
    )
    assert longer.tolist() == expected.tolist()
    assert other_hooks(model) == theirs


def test_token_ids_are_gone_on_from_as_they_are(embedded, meaning):
    start = meaning.tokens[: meaning.prompt_length]
    (task,) = ms.generate_tasks(embedded, start, [None], max_new_tokens=12)
    assert task.tokens.tolist() == meaning.tokens.tolist()
    assert ms.generate(embedded, start, max_new_tokens=12) == "<s>" + ms.generate(
        embedded, PROMPT, max_new_tokens=12
    )
    with pytest.raises(
        ValueError, match=r"Token ids run from 0 to 5000, but the model has 0 to 1023"
    ):
        ms.generate(embedded, torch.tensor([0, 5000]))


@pytest.mark.fault(54)
def test_no_text_is_written_from_an_edit_that_gives_nan(embedded):
    with pytest.raises(
        ValueError,
        match="run under the edit holds NaN or inf, first at layer 0 attn, position 0 of edit 1",
    ):
        ms.generate(
            embedded, PROMPT, [None, lambda x, hook=None: x * float("nan")], max_new_tokens=2
        )


@pytest.mark.fault(54)
def test_a_hook_that_gives_nan_without_any_edit_is_blamed_and_no_edit(embedded):
    nan = ("blocks.1.hook_mlp_out", lambda x, hook: x * torch.nan)
    with (
        embedded.hooks(fwd_hooks=[nan]),
        pytest.warns(UserWarning, match="already has hooks"),
        pytest.raises(ValueError, match=r"The clean run .* what is on the model at blocks\.1"),
    ):
        ms.generate(embedded, PROMPT, max_new_tokens=2)


@pytest.mark.fault(10)
def test_token_ids_without_bos_warn(embedded, meaning):
    with pytest.warns(UserWarning, match="no BOS token, though the model has one"):
        ms.generate(embedded, meaning.tokens[1:4], max_new_tokens=2)


@pytest.mark.fault(6)
def test_bad_prompts_and_lengths_are_refused(embedded, meaning_svd, monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"The prompt has 9 tokens and the continuation 500, but the context holds \d+",
    ):
        ms.generate(embedded, PROMPT, max_new_tokens=500)
    with pytest.raises(ValueError, match="`max_new_tokens` is 0"):
        ms.generate(embedded, PROMPT, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"`temperature` is -1\.0"):
        ms.generate(embedded, PROMPT, temperature=-1.0)
    with pytest.warns(UserWarning, match="2 oldest tokens of the prompt were dropped"):
        ms.generate(embedded, PROMPT, max_new_tokens=embedded.cfg.n_ctx - 7, truncate="left")
    monkeypatch.setattr(type(embedded.tokenizer), "bos_token_id", None, raising=False)
    with pytest.raises(ValueError, match="no BOS token; there is no bare start, so give a prompt"):
        ms.generate(embedded, "")


def test_a_basis_of_another_model_is_refused(meaning_svd):
    with pytest.raises(ValueError, match="The edit's basis has d_model 128, but the model's is 32"):
        ms.generate(
            tiny("Llama"), tiny_task().tokens, ms.keep(meaning_svd.subspace(4)), max_new_tokens=5
        )


@pytest.mark.fault(22)
def test_an_exception_leaves_no_hook_and_the_mode(embedded):
    def fail(x, hook=None):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ms.generate(embedded, PROMPT, fail)
    assert not other_hooks(embedded)
    assert torch.is_grad_enabled()


@pytest.mark.fault(26)
def test_memory_running_out_halves_the_edits_in_one_pass(embedded, meaning_svd, monkeypatch):
    from mechsvd.experiments import generation

    edits = [ms.keep(meaning_svd.subspace(rank)) for rank in (110, 60, 20)]
    expected, plain = (
        ms.generate(embedded, PROMPT, edits, max_new_tokens=5),
        generation.continue_tokens,
    )

    def small(model, tokens, *args, **options):
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("no")
        return plain(model, tokens, *args, **options)

    monkeypatch.setattr(generation, "continue_tokens", small)
    with pytest.warns(UserWarning, match="Out of memory"):
        assert ms.generate(embedded, PROMPT, edits, max_new_tokens=5) == expected
