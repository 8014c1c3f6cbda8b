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
    texts = [shape.name for shape in figure.layout.shapes]
    assert texts[0].startswith("llama: clean ")
    assert texts[1].startswith("gpt2: clean ")
    assert all(shape.showlegend for shape in figure.layout.shapes)
    assert figure.layout.showlegend


def test_sweeps_of_one_text_share_their_clean_line(sweeps):
    one = sweeps["llama"]
    figure = figures.surprise({"a": one, "b": one})
    assert len(clean_lines(figure)) == 1
    assert figure.layout.shapes[0].name.startswith("clean ")
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


@pytest.fixture(scope="module")
def results():
    """Results of two models, by the parts of the figures that take them."""
    found = {}
    for name, model in {"llama": tiny("Llama"), "gpt2": tiny("GPT-2")}.items():
        tasks = [tiny_task(seed=i) for i in range(2)]
        writes = ms.collect_writes(model, tasks[0])
        svd = ms.decompose(writes)
        scores = ms.hessian_attribution(model, tasks[0], svd, pairs=4)
        found[name] = {
            "svd": svd,
            "writes": writes,
            "layers": ms.decompose(writes, per="layer"),
            "sweep": ms.sweep_rank(model, tasks[0], svd, [0, 3, 17]),
            "ranking": ms.rank_directions(model, tasks[0], svd),
            "critical": ms.critical_rank(model, tasks[0], svd),
            "ridge": ms.sweep_ridge(model, tasks[0], svd, [1.0, 10.0]),
            "dose": ms.dose_response(model, tasks[0], svd, [0, 3], gains=[0.0, 1.0, 2.0]),
            "scores": scores,
            "pairs": ms.interactions(model, tasks[0], svd, scores, rows=3, draws=2),
            "curvature": ms.shrink_by_curvature(model, tasks[0], svd, scores, alphas=[1e-3, 1.0]),
            "estimate": ms.refine_ranking(
                model, tasks[0], svd, ms.estimate_ranking(model, tasks[0], svd), 0.3
            ),
            "overlap": ms.overlap([svd.subspace(2), svd.subspace(3)]),
            "pool": ms.pool([svd.subspace(2), svd.subspace(3)]),
            "held out": ms.fit_and_measure(model, tasks, 2, ranks=[0, 4]),
            "anchors": ms.overlap_anchors(model, tasks, [2, 3]),
        }
    return found


# a figure of one result, its result, and the words of its hover
DRAWN = {
    "singular_values": (figures.singular_values, "svd", "direction %{x} σ = %{y"),
    "cumulative": (figures.cumulative_singular_values, "svd", "first %{x} directions Σσ = %{y"),
    "layer_spectra": (figures.layer_spectra, "layers", "layer direction %{x} σ = %{y"),
    "probability": (figures.probability, "sweep", "k = %{x} p = %{y"),
    "surprise": (figures.surprise, "sweep", "k = %{x} %{y:.4g} nats"),
    "metric": (figures.metric, "sweep", "k = %{x} %{y:.4g} nats"),
    "deltas": (figures.deltas, "sweep", "k = %{x} %{y"),
    "delta_map": (figures.delta_map, "sweep", "site %{y} k = %{x} %{z"),
    "margins": (figures.margins, "critical", "k = %{x} %{y nats above"),
    "effects": (figures.direction_effects, "ranking", "direction %{customdata σ = %{x %{y nats"),
    "dose_response": (figures.dose_response, "dose", "direction σ = gain %{x %{y nats"),
    "spectrum": (figures.hessian_spectrum, "scores", "direction %{ λ = %{y residual u·w"),
    "errors": (figures.estimate_errors, "scores", "direction %{customdata measured %{x %{y"),
    "interactions": (figures.interactions, "pairs", "Hessian %{x %{y of the pairs"),
    "curvature": (figures.curvature_ridge, "curvature", "directions probability %{y"),
    "estimates": (figures.estimated_effects, "estimate", "direction %{customdata estimate effect"),
    "overlap_map": (figures.overlap_map, "overlap", "%{y} and %{x} dimensions shared random"),
    "pooled": (figures.pooled_spectrum, "pool", "direction %{x} %{y"),
    "held_out": (figures.held_out, "held out", "k = %{x} %{y nats per token"),
    "anchors": (figures.overlap_anchors, "anchors", "k = %{x} overlap %{y shared"),
}


def hovers(figure):
    """What hovering says over each trace; nothing over bands and what is only drawn."""
    return [trace.hovertemplate for trace in figure.data if trace.hoverinfo != "skip"]


@pytest.mark.parametrize("name", DRAWN)
def test_hovering_names_what_is_under_the_pointer(name, results):
    draw, kind, words = DRAWN[name]
    for figure in (
        draw(results["llama"][kind]),
        draw({name: found[kind] for name, found in results.items()}),
    ):
        assert hovers(figure)
        for template in hovers(figure):
            assert template
            assert template.endswith("<extra></extra>")
            for word in words.split():
                assert word in template, (word, template)


def test_maps_say_site_token_share_and_singular_value(results):
    found = results["llama"]
    (template,) = hovers(figures.writer_map(found["svd"], found["writes"]))
    size = float(found["svd"].singular_values[0])
    for words in ("site %{y}", "token %{customdata}", "%{z:.2f} % of direction 0", f"{size:.4g}"):
        assert words in template


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_of_one_result_takes_several_by_name(name, results):
    draw, kind, _ = DRAWN[name]
    apart = [draw(found[kind]) for found in results.values()]
    together = draw({name: found[kind] for name, found in results.items()})
    assert len(together.data) == sum(len(figure.data) for figure in apart)
    column = "z" if apart[0].data[0].type == "heatmap" else "y"
    drawn = sorted(str(list(getattr(trace, column))) for trace in together.data)
    assert drawn == sorted(
        str(list(getattr(trace, column))) for figure in apart for trace in figure.data
    )
    shown = str(together.to_dict())
    assert "llama" in shown
    assert "gpt2" in shown
    with pytest.raises(ValueError, match="give at least one, by its name"):
        draw({})


def test_heat_maps_side_by_side_have_one_scale_from_the_least_to_the_largest(sweeps):
    figure = figures.delta_map(sweeps)
    every = [value for one in sweeps.values() for value in figures.delta_map(one).data[0].z.ravel()]
    assert figure.layout.coloraxis.cmin == pytest.approx(min(every))
    assert figure.layout.coloraxis.cmax == pytest.approx(max(every))
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert {trace.zmin for trace in figure.data} == {None}
    assert [note.text for note in figure.layout.annotations[:2]] == ["llama", "gpt2"]


def test_panels_share_their_axes_legend_and_keep_their_own_clean_lines(sweeps):
    figure = figures.side_by_side(
        {name: figures.surprise({"a": one, "b": one}) for name, one in sweeps.items()}, columns=1
    )
    assert [(t.name, t.showlegend) for t in figure.data] == [
        ("a", True), ("b", True), ("a", False), ("b", False),
    ]  # fmt: skip
    assert [(trace.xaxis, trace.yaxis) for trace in figure.data[1:3]] == [("x", "y"), ("x2", "y2")]
    assert figure.layout.yaxis2.type == "log"
    cleans = [-float(one.measurement.clean_run.log_prob) for one in sweeps.values()]
    assert [(s.yref, s.y0) for s in figure.layout.shapes] == [
        ("y", pytest.approx(cleans[0])),
        ("y2", pytest.approx(cleans[1])),
    ]
    assert figure.layout.shapes[1].xref == "x2 domain"
    assert figure.layout.annotations[1].text == f"gpt2, clean {cleans[1]:.4g}"
    with pytest.raises(ValueError, match="no figures to lay side by side"):
        figures.side_by_side({})
    with pytest.raises(ValueError, match="`columns` is 0"):
        figures.side_by_side({"a": figure}, columns=0)


def test_logarithmic_axes_have_ticks_at_decades():
    svd = ms.decompose(torch.randn(1, 30, 8))

    def step(sizes):
        from dataclasses import replace

        own = replace(svd, singular_values=torch.tensor(sizes))
        return figures.singular_values(own, log=True).layout.yaxis.dtick

    assert step([2000.0, 300.0, 50.0, 20.0, 9.0, 4.0, 3.0, 2.0]) == 1
    assert step([1e9, 1e6, 1e3, 1e2, 1e1, 1e-6, 1e-10, 1e-20]) == 4  # 30 decades
    assert step([90.0, 50.0, 40.0, 30.0, 20.0, 9.0, 8.0, 7.0]) == "D2"
    assert step([2.4, 2.3, 2.3, 2.2, 2.1, 2.1, 2.1, 2.0]) is None


def test_several_rankings_and_searches_have_a_colour_each(results):
    rankings = {name: found["ranking"] for name, found in results.items()}
    figure = figures.direction_effects(rankings)
    assert len({trace.marker.color for trace in figure.data[:3]}) == 1
    assert len({trace.marker.color for trace in figure.data}) == 2
    for trace, ranking in zip(figure.data[::3], rankings.values(), strict=True):
        assert trace.name.endswith(f"(ρ = {ranking.correlation('size'):.2f})")
    margins = figures.margins({name: found["critical"] for name, found in results.items()})
    drawn = {s.x0: s.line.color for s in margins.layout.shapes if s.x0 == s.x1}
    for trace, found in zip(margins.data, results.values(), strict=True):
        rank = found["critical"].rank
        assert rank is None or trace.line.color in {drawn[rank]} or len(drawn) == 1
