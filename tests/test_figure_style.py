"""Figures of several results, their looks, and their data."""

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

import mechsvd as ms
from mechsvd import figures
from tests.conftest import tiny, tiny_task


@pytest.fixture(scope="module")
def sweeps():
    models = {"llama": tiny("Llama"), "gpt2": tiny("GPT-2")}
    found = {}
    for name, model in models.items():
        svd = ms.decompose(ms.collect_writes(model, [tiny_task(seed=i) for i in range(5)]))
        found[name] = ms.sweep_rank(model, tiny_task(), svd, [0, 3, 17])
    return found


def clean_lines(figure):
    return [shape.y0 for shape in figure.layout.shapes if shape.type == "line"]


@pytest.mark.parametrize("draw", [figures.probability, figures.surprise, figures.deltas])
def test_two_models_are_drawn_each_with_its_own_clean_line(draw, sweeps):
    figure = draw(sweeps)
    assert len(clean_lines(figure)) == 2
    assert len({*clean_lines(figure)}) == 2
    texts = [note.text for note in figure.layout.annotations]
    assert texts[0].startswith("llama: clean ")
    assert texts[1].startswith("gpt2: clean ")
    assert figure.layout.showlegend


def test_sweeps_of_one_text_share_their_clean_line(sweeps):
    one = sweeps["llama"]
    figure = figures.surprise({"a": one, "b": one})
    assert len(clean_lines(figure)) == 1
    assert figure.layout.annotations[0].text.startswith("clean ")
    with pytest.raises(ValueError, match="There is no RankSweep to draw"):
        figures.surprise({})


def test_spectra_of_several_decompositions():
    svds = {name: ms.decompose(torch.randn(1, 30, 8)) for name in ("a", "b")}
    for draw in (figures.singular_values, figures.cumulative_singular_values):
        figure = draw(svds)
        assert [trace.name for trace in figure.data] == ["a", "b"]
        assert figure.data[1].hovertemplate.startswith("b<br>")
        assert not draw(svds["a"]).layout.showlegend


def test_the_template_is_known_by_name_and_the_default_stays(sweeps, monkeypatch):
    assert "mechsvd" in pio.templates
    assert pio.templates.default == "plotly"
    own = figures.surprise(sweeps["llama"])
    assert own.layout.template.layout.title.font.size == 16
    monkeypatch.setattr(pio.templates, "default", "plotly_dark")
    dark = figures.surprise(sweeps["llama"])
    assert (
        dark.layout.template.layout.paper_bgcolor
        == pio.templates["plotly_dark"].layout.paper_bgcolor
    )
    # and a figure that was drawn before turns dark, too: nothing is fixed in it
    own.update_layout(template="plotly_dark")
    fixed = own.layout.to_plotly_json()
    assert not {"paper_bgcolor", "plot_bgcolor", "font"} & fixed.keys()
    assert not {"gridcolor", "linecolor"} & fixed["xaxis"].keys()


def test_the_data_of_a_figure_as_a_table(sweeps):
    sweep = sweeps["llama"]
    table = figures.data(figures.surprise(sweep))
    assert [*table.columns] == ["trace", "x", "y"]
    assert [*table["x"]] == [0, 3, 17]
    assert [*table["y"]] == pytest.approx((-sweep.measurement.log_prob).tolist())
    z = figures.data(go.Figure(go.Heatmap(x=[1, 2], y=["a"], z=[[3, 4]], name="map")))
    assert z.to_dict("records") == [
        {"trace": "map", "x": 1, "y": "a", "z": 3},
        {"trace": "map", "x": 2, "y": "a", "z": 4},
    ]
    assert len(figures.data(go.Figure())) == 0
    both = figures.data(figures.deltas(sweeps))
    assert {*both["trace"]} == {
        f"{name}: {kind}" for name in sweeps for kind in ("orig_delta", "kept_delta")
    }
