import pytest

from mechsvd.model.sites import find_sites
from tests.conftest import tiny


@pytest.fixture(scope="module")
def llama():
    return tiny("Llama")


def test_sites_come_in_the_order_of_writing(llama):
    assert [str(site) for site in find_sites(llama)] == ["0 attn", "0 mlp", "1 attn", "1 mlp"]
    assert [str(site) for site in find_sites(llama, layers=1, components=("mlp", "attn"))] == [
        "1 attn",
        "1 mlp",
    ]
    assert [str(site) for site in find_sites(llama, layers=[1, 0], components="mlp")] == [
        "0 mlp",
        "1 mlp",
    ]


@pytest.mark.fault(13)
def test_unknown_layers_and_components_are_refused_with_the_valid_range(llama):
    with pytest.raises(KeyError, match=r"No layers \[2\]: the model has layers 0–1"):
        find_sites(llama, layers=[0, 2])
    with pytest.raises(KeyError, match="No component 'atn'.*Did you mean 'attn'"):
        find_sites(llama, components=["atn"])
    with pytest.raises(ValueError, match="No sites are left"):
        find_sites(llama, layers=[])


@pytest.mark.fault(14)
def test_a_layer_without_the_hook_is_refused_or_skipped_on_request():
    mamba = tiny("Mamba")
    with pytest.raises(KeyError, match=r"No hook point `blocks.0.hook_attn_out`.*missing='skip'"):
        find_sites(mamba)
    with pytest.raises(ValueError, match="No sites are left"):
        find_sites(mamba, missing="skip")
