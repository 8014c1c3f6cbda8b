import pytest
import torch

from mechsvd.model.decoding import continue_tokens
from mechsvd.model.runs import run_model
from tests.conftest import tiny, tiny_task


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


@pytest.mark.fault(13)
def test_an_unknown_hook_is_refused_with_close_matches(llama):
    with pytest.raises(
        KeyError, match=r"No hook point `blocks.0.hook_atn_out`.*blocks.0.hook_attn_out"
    ):
        run_model(llama, tiny_task().tokens[None], [("blocks.0.hook_atn_out", lambda x, hook: x)])


@pytest.mark.fault(15)
def test_a_hook_that_never_fires_is_an_error_after_the_run(llama, monkeypatch):
    name = "blocks.0.hook_mlp_out"
    run = type(llama).run_with_hooks
    ours = lambda self, tokens, fwd_hooks, **kw: run(
        self, tokens, fwd_hooks=[h for h in fwd_hooks if h[0] != name], **kw
    )
    monkeypatch.setattr(
        type(llama), "run_with_hooks", ours
    )  # as the 3.9 bridge does with names that it does not know
    with pytest.raises(RuntimeError, match=rf"The hook at `{name}` fired 0 of 1 times"):
        run_model(llama, tiny_task().tokens[None], [(name, lambda x, hook=None: None)])


@pytest.mark.fault(15)
def test_generating_a_hook_that_does_not_fire_at_each_step_is_an_error(llama, monkeypatch):
    run = type(llama).run_with_hooks  # as if the model did not know the name
    monkeypatch.setattr(
        type(llama), "run_with_hooks", lambda self, x, fwd_hooks, **options: run(self, x, **options)
    )
    monkeypatch.setattr("mechsvd.model.decoding.keeps_cache", lambda model, length: False)
    with pytest.raises(RuntimeError, match=r"`blocks.0.hook_mlp_out` fired 0 of 1 times"):
        continue_tokens(
            llama, tiny_task().tokens[None], 2, [("blocks.0.hook_mlp_out", lambda x, hook=None: x)]
        )


def test_scored_positions_get_the_logits_that_they_get_in_a_full_run(llama):
    tokens = tiny_task().tokens[None]
    with torch.no_grad():
        torch.testing.assert_close(
            run_model(llama, tokens, scored=slice(3, 6)), run_model(llama, tokens)[:, 3:6]
        )
