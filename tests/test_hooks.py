import pytest
import torch

import mechsvd as ms
from mechsvd.edits.gates import Gate
from mechsvd.edits.maps import EditError
from mechsvd.model.cache import taking_cache
from mechsvd.model.evaluation import other_hooks
from tests.conftest import tiny, tiny_task
from tests.test_subspace import orthonormal

pytestmark = pytest.mark.older


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


TOKENS = tiny_task().tokens[None]


def logits(model, hooks=()):
    with torch.no_grad():
        return model.run_with_hooks(TOKENS, fwd_hooks=list(hooks))


def test_keeping_everything_leaves_the_logits_as_they_are(llama):
    everything = ms.keep(ms.span(torch.eye(32)))
    torch.testing.assert_close(logits(llama, ms.fwd_hooks(llama, everything)), logits(llama))


def test_ablating_everything_equals_zeroing_every_write(llama):
    hooks = ms.fwd_hooks(llama, ms.ablate(ms.span(torch.eye(32))))
    zero = [
        (f"blocks.{i}.hook_{c}_out", lambda x, hook: torch.zeros_like(x))
        for i in range(2)
        for c in ("attn", "mlp")
    ]
    torch.testing.assert_close(logits(llama, hooks), logits(llama, zero))


def test_our_hooks_compose_with_anybody_elses_in_any_nesting(llama):
    subspace = ms.Subspace(orthonormal(32, 8).float())
    theirs = ("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)
    both = logits(llama, [*ms.fwd_hooks(llama, ms.keep(subspace), layers=0), theirs])
    with llama.hooks(fwd_hooks=[theirs]):
        nested = logits(llama, ms.fwd_hooks(llama, ms.keep(subspace), layers=0))
    torch.testing.assert_close(both, nested)
    assert (
        both - logits(llama, ms.fwd_hooks(llama, ms.keep(subspace), layers=0))
    ).abs().max() > 1e-3
    assert not other_hooks(llama)


def test_an_edit_is_itself_a_hook_function(llama):
    edit = ms.keep(ms.Subspace(orthonormal(32, 8).float()))
    torch.testing.assert_close(
        logits(llama, [("blocks.0.hook_mlp_out", edit)]),
        logits(llama, ms.fwd_hooks(llama, edit, layers=[0], components=["mlp"])),
    )


def test_positions_are_edited_and_the_others_spared(llama):
    seen = {}
    hooks = ms.fwd_hooks(
        llama, lambda x, hook: x * 0, layers=0, components=["attn"], positions=[2, 4]
    )
    hooks.append(("blocks.0.hook_attn_out", lambda x, hook: seen.__setitem__("edited", x)))
    logits(llama, hooks)
    logits(llama, [("blocks.0.hook_attn_out", lambda x, hook: seen.__setitem__("clean", x))])
    assert (seen["edited"][:, [2, 4]] == 0).all()
    spared = [0, 1, 3, 5, 6, 7, 8]
    torch.testing.assert_close(seen["edited"][:, spared], seen["clean"][:, spared])


@pytest.mark.fault(20)
def test_positions_are_absolute_while_decoding_with_a_cache(embedded):
    tokens = embedded.to_tokens("I believe the meaning of life is")
    position = tokens.shape[1] + 1  # the second new token
    edit = lambda x, hook=None: -3 * x
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_type": "tokens",
        "verbose": False,
        "stop_at_eos": False,
    }
    hooks = ms.fwd_hooks(embedded, edit, positions=[position])
    with embedded.hooks(fwd_hooks=hooks), taking_cache(embedded):
        cached = embedded.generate(tokens, use_past_kv_cache=True, **options)
    with embedded.hooks(fwd_hooks=ms.fwd_hooks(embedded, edit, positions=[position])):
        plain = embedded.generate(tokens, use_past_kv_cache=False, **options)
    assert cached.tolist() == plain.tolist()
    assert cached.tolist() != embedded.generate(tokens, **options).tolist()


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, hook: x[:, :1],
        lambda x, hook: x[..., :4],
        lambda x, hook: None,
        lambda x, hook: x.mean(),
    ],
)
def test_a_wrong_shape_is_an_error_with_its_site(llama, wrong):
    with pytest.raises(
        ValueError, match=r"The edit at layer 1 mlp returned .* for writes of shape \[1, 9, 32\]"
    ):
        logits(llama, ms.fwd_hooks(llama, wrong, layers=1, components=["mlp"]))
    assert not other_hooks(llama)


@pytest.mark.fault(21)
def test_a_wrong_dtype_is_put_right(llama):
    hooks = ms.fwd_hooks(llama, lambda x, hook: x.double())
    torch.testing.assert_close(logits(llama, hooks), logits(llama))


def test_an_error_inside_an_edit_keeps_its_type_and_says_its_site(llama):
    class Mine(Exception):
        pass

    def raise_it(error):
        def edit(x, hook):
            raise error

        return edit

    with pytest.raises(
        ZeroDivisionError, match="The edit failed at layer 0 attn: division by zero"
    ):
        logits(llama, ms.fwd_hooks(llama, lambda x, hook: x * (1 / 0)))
    with pytest.raises(Mine, match="The edit failed at layer 0 attn: with text"):
        ms.measure(llama, tiny_task(), [raise_it(Mine("with text"))])
    with pytest.raises(Mine) as caught:
        logits(llama, ms.fwd_hooks(llama, raise_it(Mine(1, 2))))
    assert caught.value.args == (1, 2)
    if hasattr(caught.value, "add_note"):  # from Python 3.11 on
        assert caught.value.__notes__ == ["The edit failed at layer 0 attn."]
    assert not other_hooks(llama)


@pytest.mark.fault(18)
def test_a_basis_of_another_model_size_and_bad_positions_are_refused(llama):
    with pytest.raises(ValueError, match="d_model 16, but the model's is 32"):
        ms.fwd_hooks(llama, ms.keep(ms.Subspace(orthonormal(16, 4))))
    with pytest.raises(
        ValueError, match=r"No positions \[-1\]: the length of the text is not known"
    ):
        ms.fwd_hooks(llama, ms.chain(), positions=[-1])
    with pytest.raises(ValueError, match="`positions` is empty"):
        ms.fwd_hooks(llama, ms.chain(), positions=[])


@pytest.mark.fault(43)
def test_a_stack_edits_each_row_by_its_own_gate_and_refuses_other_batches(llama):
    stack = Gate(torch.eye(32), torch.rand(3, 32))
    with pytest.raises(ValueError, match="stack of 3 edits meets a batch of 1 rows at layer 0"):
        logits(llama, ms.fwd_hooks(llama, stack))
    rows = tiny_task().tokens.expand(3, -1)
    together = llama.run_with_hooks(rows, fwd_hooks=ms.fwd_hooks(llama, stack))
    for row in range(3):
        alone = logits(llama, ms.fwd_hooks(llama, stack[row]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits(llama, ms.fwd_hooks(llama, stack[1])),
        logits(llama, ms.fwd_hooks(llama, ms.gate(torch.eye(32), stack.gains[1]))),
    )


@pytest.mark.fault(21)
def test_an_edit_in_place_is_an_error_and_not_a_silent_change(llama):
    def in_place(x, hook):
        x[:, -1] = 0
        return x

    for positions in (None, [2]):
        with pytest.raises(
            ValueError,
            match="The edit at layer 0 attn changed its input in place.*return a new tensor",
        ):
            logits(llama, ms.fwd_hooks(llama, in_place, positions=positions))
    with pytest.raises(ValueError, match="in place"):
        ms.measure(llama, tiny_task(), [ms.chain(), in_place])


@pytest.mark.fault(18)
def test_a_basis_of_another_model_is_refused_wherever_it_hides(llama, silent):
    other = tiny("Qwen2")
    foreign = ms.keep(ms.decompose(ms.collect_writes(other, tiny_task())).subspace(5))
    for edit in (foreign, ms.chain(ms.shift(torch.ones(32)), ms.chain(foreign))):
        with pytest.raises(ValueError, match="The basis and the model come from different models"):
            ms.fwd_hooks(llama, edit)
        with pytest.raises(ValueError, match="come from different models"):
            ms.measure(llama, tiny_task(), [ms.chain(), edit])
        assert len(ms.fwd_hooks(llama, edit, check=False)) == 4


def test_positions_may_be_a_tensor_but_not_a_mask(llama):
    zero = lambda x, hook: x * 0
    expected = logits(llama, ms.fwd_hooks(llama, zero, positions=[2, 4]))
    for positions in (torch.tensor([4, 2]), range(2, 5, 2), {2, 4}):
        torch.testing.assert_close(
            logits(llama, ms.fwd_hooks(llama, zero, positions=positions)), expected
        )


def test_a_model_that_flattens_its_mlp_takes_plain_hooks_too():
    opt = tiny("OPT")
    torch.testing.assert_close(
        logits(opt, ms.fwd_hooks(opt, ms.keep(ms.span(torch.eye(32))))), logits(opt)
    )


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "OPT"])
@pytest.mark.parametrize("positions", [None, [1, 2]])
def test_an_edit_is_given_its_site_by_the_name_of_find_sites(architecture, positions, silent):
    """On a bridge the hook point itself goes by another name (`blocks.0.attn.hook_out`)."""
    model, task, seen = tiny(architecture), tiny_task(), []

    def look(x, hook):
        seen.append((hook.name, hook.layer(), str(hook)))
        return x

    sites = ms.find_sites(model)
    expected = [
        (site.hook_name, site.layer, f"layer {site.layer} {site.component}") for site in sites
    ]
    model.run_with_hooks(
        task.tokens[None], fwd_hooks=ms.fwd_hooks(model, look, positions=positions)
    )
    assert seen == expected
    for call in (
        lambda: ms.measure(model, task, [look], positions=positions),
        lambda: ms.generate_tasks(model, task.tokens[:3], [look], max_new_tokens=1),
    ):
        seen.clear()
        call()
        assert set(seen) == set(expected)


@pytest.mark.fault(43)
def test_edits_that_trade_rows_are_refused_by_name_and_site(llama):
    def two(x, hook):
        return x.expand(2, -1, -1)

    def none(x, hook):
        return x[:0]

    for pair, rows in (([two, none], 2), ([none, two], 0)):
        with pytest.raises(
            EditError,
            match=rf"at layer 0 attn returned \[{rows}, 9, 32\] for writes of shape \[1, 9, 32\]",
        ):
            ms.measure(llama, tiny_task(), pair)
    with pytest.raises(EditError, match="This one is <function .*two"):
        ms.measure(llama, tiny_task(), [two, none])
