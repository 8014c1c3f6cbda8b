import dataclasses
import math

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd import figures
from mechsvd.linalg.decomposition import Decomposition


@pytest.fixture(scope="module")
def sweep(embedded, meaning, meaning_svd):
    return ms.sweep_rank(embedded, meaning, meaning_svd)


def drawn(figure, trace=0):
    """The figure's own data, as a browser would get it."""
    figure.to_json()
    return figure.data[trace]


def test_singular_values_descend(meaning_svd):
    for log in (False, True):
        figure = figures.singular_values(meaning_svd, log=log)
        np.testing.assert_allclose(drawn(figure).y, meaning_svd.singular_values.numpy())
        assert list(figure.data[0].x) == list(range(128))
        assert (np.diff(figure.data[0].y) <= 0).all()
        assert figure.layout.yaxis.type == ("log" if log else "linear")


def test_cumulative_values_end_at_the_sum_on_a_logarithmic_axis(meaning_svd):
    figure = figures.cumulative_singular_values(meaning_svd)
    assert drawn(figure).y[-1] == pytest.approx(float(meaning_svd.singular_values.sum()), rel=1e-5)
    assert figure.data[0].customdata[-1] == pytest.approx(1)
    assert figure.layout.xaxis.type == "log"


def test_layer_spectra_draw_one_line_a_layer(embedded, meaning, silent):
    layers = ms.decompose(ms.collect_writes(embedded, meaning), per_layer=True)
    figure = figures.layer_spectra(layers)
    assert [trace.name for trace in figure.data] == [f"layer {i}" for i in range(6)]
    np.testing.assert_allclose(drawn(figure, 3).y, layers[3].singular_values.numpy())


def test_a_writer_map_shows_site_and_token_and_sums_to_a_hundred(embedded, meaning, meaning_svd):
    writes = ms.collect_writes(embedded, meaning)
    figure = figures.writer_map(meaning_svd, writes, direction=2)
    heat = drawn(figure)
    assert heat.z.sum() == pytest.approx(100, rel=1e-4)
    assert list(heat.y) == [str(site) for site in writes.sites]
    assert heat.customdata[0][1] == f"1: {writes.pieces[1]}"


@pytest.mark.parametrize(
    ("draw", "column", "clean"),
    [
        (figures.probability, "probability", lambda c: c.log_prob.exp()),
        (figures.surprise, "surprise", lambda c: -c.log_prob),
    ],
)
def test_a_sweep_is_drawn_with_its_clean_value_as_a_line(sweep, draw, column, clean):
    figure = draw(sweep)
    np.testing.assert_allclose(drawn(figure).y, sweep.to_pandas()[column], rtol=1e-6)
    assert figure.layout.shapes[0].y0 == pytest.approx(float(clean(sweep.measurement.clean)))
    assert figure.layout.shapes[0].name == f"clean {float(clean(sweep.measurement.clean)):.4g}"
    assert not figure.layout.annotations  # which could lie on the curve


def test_attempted_and_kept_writes_are_drawn_together(sweep):
    figure = figures.deltas(sweep)
    assert [trace.name for trace in figure.data] == ["orig_delta", "kept_delta"]
    np.testing.assert_allclose(drawn(figure, 1).y, sweep.to_pandas()["kept_delta"], rtol=1e-6)


def test_the_map_of_deltas_is_relative_to_clean_and_ends_at_one(sweep):
    for kept in (True, False):
        heat = drawn(figures.delta_map(sweep, kept=kept))
        assert heat.z.shape == (12, 129)
        np.testing.assert_allclose(heat.z[:, -1], 1, rtol=1e-3)


def test_axes_carry_units_and_nothing_global_is_set(sweep, meaning_svd):
    import plotly.io

    before = plotly.io.templates.default
    assert "residual-stream units" in figures.singular_values(meaning_svd).layout.yaxis.title.text
    assert "nats" in figures.surprise(sweep).layout.yaxis.title.text
    assert plotly.io.templates.default == before


def test_many_points_are_drawn_with_webgl(silent):
    many = Decomposition(torch.ones(6000), torch.zeros(2, 6000), torch.zeros(1, 1, 6000))
    assert figures.singular_values(many).data[0].type == "scattergl"


def test_a_sweep_without_a_clean_run_cannot_be_compared(sweep):
    from dataclasses import replace

    bare = replace(sweep, measurement=replace(sweep.measurement, clean=None))
    with pytest.raises(ValueError, match="holds no clean run"):
        figures.probability(bare)


def test_effects_are_drawn_by_sign_and_noise_with_every_direction_once(
    embedded, meaning, meaning_svd
):
    ranking = ms.rank_directions(embedded, meaning, meaning_svd)
    figure = figures.direction_effects(ranking)
    figure.to_json()
    assert [trace.name for trace in figure.data] == ["damage", "gain", "noise"]
    assert sorted(int(i) for trace in figure.data for i in trace.customdata) == list(range(128))
    damage = figure.data[0]
    places = [int(i) for i in damage.customdata]
    np.testing.assert_allclose(damage.y, ranking.effect.numpy()[places], rtol=1e-6)
    assert (damage.y > ranking.noise_floor).all()

    def title(values):
        pair = (ranking.singular_values.numpy(), values.numpy())
        ranks = [np.argsort(np.argsort(numbers)) for numbers in pair]
        return f"{np.corrcoef(*ranks)[0, 1]:.2f}"

    assert figure.layout.title.text.endswith(title(ranking.effect.abs()))  # of what is drawn
    by = figures.direction_effects(ranking, by="kl_divergence")
    np.testing.assert_allclose(drawn(by).y, ranking.measurement.kl_divergence.numpy())
    assert by.layout.title.text.endswith(title(ranking.measurement.kl_divergence))
    assert by.layout.yaxis.title.text == "KL divergence (nats per token)"


def test_a_metric_is_on_the_axis_with_its_name_and_unit(embedded, meaning, meaning_svd):
    sweep = ms.sweep_rank(
        embedded, meaning, meaning_svd, ranks=[0, 40, 128], metric=ms.cross_entropy
    )
    figure = figures.metric(sweep)
    assert figure.layout.yaxis.title.text == "cross_entropy (nats per token)"
    np.testing.assert_allclose(drawn(figure).y, sweep.to_pandas()["cross_entropy"])
    ranking = ms.rank_directions(embedded, meaning, meaning_svd, metric=ms.cross_entropy)
    axis = figures.direction_effects(ranking).layout.yaxis.title.text
    assert axis == "|effect| on the cross_entropy (nats per token)"


def test_a_dose_is_drawn_next_to_its_random_direction(embedded, meaning, meaning_svd):
    found = ms.dose_response(embedded, meaning, meaning_svd, [0, 3], gains=[0.0, 1.0, 2.0])
    figure = figures.dose_response(found)
    assert [trace.name for trace in figure.data[::2]] == ["direction 0", "direction 3"]
    np.testing.assert_allclose(drawn(figure, 2).y, found.effects[0, 1].numpy())
    np.testing.assert_allclose(drawn(figure, 3).y, found.random_effects[0, 1].numpy())
    assert "log-probability (nats)" in figure.layout.yaxis.title.text


def test_orders_race_on_one_axis(embedded, meaning, meaning_svd):
    orders = {
        "σ": ms.order_by_singular_value(meaning_svd),
        "random": ms.order_at_random(meaning_svd),
    }
    sweeps = {
        name: ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[0, 30, 128], order=order)
        for name, order in orders.items()
    }
    figure = figures.race_of_orders(sweeps)
    assert [trace.name for trace in figure.data] == ["σ", "random"]
    np.testing.assert_allclose(
        drawn(figure, 1).y, -sweeps["random"].measurement.log_prob.numpy(), rtol=1e-6
    )
    by = figures.race_of_orders(sweeps, by="absolute_change")
    drawn_values = sweeps["σ"].measurement.absolute_change.numpy()
    np.testing.assert_allclose(drawn(by).y[:2], drawn_values[:2])
    assert by.layout.yaxis.title.text == "Σ|Δ log p| over the tokens (nats)"
    with pytest.raises(ValueError, match="`by` is 'size', but must be one of"):
        figures.race_of_orders(sweeps, by="size")
    with pytest.raises(ValueError, match="no sweeps to race"):
        figures.race_of_orders({})


def test_the_critical_rank_is_marked_where_the_curve_crosses(embedded, meaning, meaning_svd):
    found = ms.critical_rank(embedded, meaning, meaning_svd)
    figure = figures.margins(found)
    np.testing.assert_allclose(drawn(figure).y, found.margins.numpy())
    assert list(figure.data[0].x) == found.sweep.ranks.tolist()
    assert found.rank in [shape.x0 for shape in figure.layout.shapes]
    assert figure.layout.title.text == "Critical rank for a drop of at most 0 nats"
    assert figure.layout.shapes[0].name.startswith(
        f"k = {found.rank}; lasting {found.lasting_rank}<br>{len(found.crossings)} crossing(s)"
    )
    greedy = ms.critical_rank(embedded, meaning, meaning_svd, criterion=ms.same_greedy_text)
    assert figures.margins(greedy).layout.yaxis.title.text == "above the threshold (tokens)"


def test_an_overlap_map_shows_ratio_and_shared_dimensions_of_every_pair(meaning_svd):
    subspaces = [meaning_svd.subspace(20), ms.random_subspace(128, 30), meaning_svd.subspace(40)]
    found = ms.overlap(subspaces)
    heat = drawn(figures.overlap_map(found, ["a", "b", "c"]))
    assert list(heat.x) == ["a<br>(rank 20)", "b<br>(rank 30)", "c<br>(rank 40)"]
    assert np.isnan(heat.z.diagonal()).all()
    assert heat.z[0, 2] == pytest.approx(
        20 / (20 * 40 / 128), rel=1e-5
    )  # the first lies in the third
    assert heat.text[0][2] == "3.200<br>20.0 shared"
    assert heat.zmin + heat.zmax == pytest.approx(2)
    with pytest.raises(ValueError, match="`names` has 1 entries for 3 subspaces"):
        figures.overlap_map(found, ["a"])


def test_a_pooled_spectrum_lies_over_its_random_band(meaning_svd):
    found = ms.pool([meaning_svd.subspace(20), meaning_svd.subspace(30)])
    figure = figures.pooled_spectrum(found)
    assert [trace.name for trace in figure.data] == ["random band", "random mean", "these bases"]
    np.testing.assert_allclose(drawn(figure, 2).y[:20], np.sqrt(2), rtol=1e-6)  # what both share
    assert len(figure.data[0].x) == len(figure.data[0].y) == 2 * len(found.singular_values)


@pytest.mark.fault(40)
def test_static_images_without_kaleido_or_chrome_say_what_to_install(
    meaning_svd, tmp_path, monkeypatch
):
    import plotly.graph_objects as go

    for missing in ("requires the Kaleido package", "Chrome was not found"):

        def fail(self, path, missing=missing):
            raise ValueError(missing)

        monkeypatch.setattr(go.Figure, "write_image", fail)
        with pytest.raises(RuntimeError, match=r"pip install 'mechsvd\[images\]'"):
            figures.save_image(figures.singular_values(meaning_svd), tmp_path / "a.png")


@pytest.mark.fault(36)
def test_an_improbable_text_stays_drawable(embedded, meaning, meaning_svd):
    found = ms.sweep_rank(embedded, meaning, meaning_svd, ranks=[0])
    (surprise,) = drawn(figures.surprise(found)).y
    assert 50 < surprise < math.inf
    assert surprise == pytest.approx(-float(found.measurement.log_prob))


@pytest.fixture(scope="module")
def attribution(real):
    return ms.hessian_attribution(
        real.model, real.task, real.svd, bases={"singular": torch.eye(real.d_model)}
    )


def test_a_spectrum_shows_every_eigenvalue_and_marks_what_did_not_converge(attribution):
    figure = figures.hessian_spectrum(attribution)
    dots = drawn(figure)
    np.testing.assert_allclose(dots.y, attribution.eigenvalues.numpy())
    np.testing.assert_allclose(dots.error_y.array, attribution.residuals.numpy())
    hollow = [symbol == "circle-open" for symbol in dots.marker.symbol]
    assert hollow == (~attribution.converged).tolist()
    assert "probability" in figure.layout.yaxis.title.text


def test_estimates_are_drawn_against_what_is_measured_without_the_noise(attribution):
    loud = dataclasses.replace(attribution, noise_floor=float(attribution.measured.abs().median()))
    figure = figures.estimate_errors(loud)
    assert [trace.name for trace in figure.data] == ["linear", "quadratic", "integrated"]
    chosen = figure.data[1].customdata
    assert len(chosen) == len(attribution) // 2
    np.testing.assert_allclose(figure.data[1].x, attribution.measured.abs().numpy()[chosen])
    np.testing.assert_allclose(
        figure.data[1].y, attribution.to_pandas().quadratic_error.to_numpy()[chosen]
    )


def test_estimated_effects_are_drawn_against_what_was_run_and_the_rest_on_the_line(real):
    found = ms.refine_ranking(
        real.model, real.task, real.svd, ms.estimate_ranking(real.model, real.task, real.svd), 0.1
    )
    figure = figures.estimated_effects(found)
    assert [trace.name for trace in figure.data] == ["not run", "run besides", "random sample"]
    hollow, besides, sample = figure.data
    assert len(hollow.x) + len(besides.x) + len(sample.x) == real.svd.rank
    np.testing.assert_array_equal(drawn(figure).y, hollow.x)
    np.testing.assert_allclose(sample.y, found.exact[found.is_sampled].numpy())
    np.testing.assert_allclose(sample.x, found.estimate[found.is_sampled].numpy())
    assert len(besides.x) == int((found.is_exact & ~found.is_sampled).sum())
    assert list(sample.customdata) == [
        f"{j}<br>σ = {float(real.svd.singular_values[j]):.4g}"
        for j in found.is_sampled.nonzero().flatten().tolist()
    ]
    row = found.agreement(1).iloc[0]
    assert f"{row.spearman:.2f} ({row.spearman_low:.2f} to" in figure.layout.title.text
    assert "nats" in figure.layout.xaxis.title.text
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1) == (line.y0, line.y1)


def test_scores_accumulate_from_the_largest_to_their_sum(attribution):
    figure = figures.accumulated_scores(attribution.bases)
    assert [trace.name for trace in figure.data] == ["Hessian", "singular", "random"]
    for trace, found in zip(figure.data, attribution.bases.values(), strict=True):
        steps = np.diff([0, *trace.y])
        assert (np.diff(steps) <= 1e-9).all()  # the largest first
        assert trace.y[-1] == pytest.approx(
            float(found.measured.sum()) / (found.value - found.baseline)
        )
    assert [shape.y0 for shape in figure.layout.shapes] == [1]
    tiny = dataclasses.replace(attribution, baseline=-1e6)
    assert not figures.accumulated_scores({"far below 1": tiny}).layout.shapes
    elsewhere = dataclasses.replace(attribution.source, tokens=((1, 2, 3),))
    others = [{"objective": "log_prob"}, {"over": "gains of others"}, {"source": elsewhere}]
    for other in others:
        with pytest.raises(
            ValueError,
            match=rf"different functions: probability over gains of {len(attribution)} directions \(",
        ):
            figures.accumulated_scores(
                {"a": attribution, "b": dataclasses.replace(attribution, **other)}
            )


def test_a_spectrum_and_sums_follow_another_order(attribution):
    order = attribution.order("measured").numpy()
    dots = drawn(figures.hessian_spectrum(attribution, order="measured"))
    np.testing.assert_allclose(dots.y, attribution.eigenvalues.numpy()[order])
    assert dots.customdata[:, 2].tolist() == order.tolist()
    figure = figures.accumulated_scores({"a": attribution}, order="eigenvalue")
    np.testing.assert_allclose(drawn(figure).y, attribution.share.cumsum(0).numpy())
    assert "in the order of the table" in figure.layout.xaxis.title.text


def test_scores_accumulate_from_the_largest_share_where_f_is_larger_at_zero(attribution):
    above = dataclasses.replace(attribution, baseline=attribution.value + 1)
    steps = np.diff([0, *drawn(figures.accumulated_scores({"a": above})).y])
    assert (np.diff(steps) <= 1e-9).all()


def test_shares_of_w_accumulate_to_all_of_it(attribution):
    figure = figures.accumulated_shares(attribution.bases)
    for number, found in enumerate(attribution.bases.values()):
        shares = found.projections.square().sort(descending=True).values / found.norm**2
        np.testing.assert_allclose(drawn(figure, number).y, shares.cumsum(0).numpy())
        assert figure.data[number].y[-1] == pytest.approx(1, rel=1e-5)  # complete bases
    assert figure.layout.yaxis.type == "log"


def test_interactions_are_drawn_as_shares_of_the_pairs_next_to_random_bases(real, attribution):
    found = ms.interactions(real.model, real.task, real.svd, attribution, rows=5, draws=3)
    figure = figures.interactions(found)
    own = [trace for trace in figure.data if "p = " in trace.name]
    assert [trace.name.partition(":")[0] for trace in own] == ["Hessian", "singular"]
    assert len(figure.data) == 2 * (3 + 1)
    for number, trace in enumerate(own):
        sizes = found.interaction[0, 0, found.basis == number].abs().sort().values
        np.testing.assert_allclose(trace.x, sizes.numpy())
        np.testing.assert_allclose(trace.y, np.arange(1, 11) / 10, rtol=1e-6)
        median = found.summary()["median"][number]
        assert f"median {median:.3g}" in trace.name
    assert [shape.x0 for shape in figure.layout.shapes] == [2 * float(found.noise_floor[0])]
    relative = figures.interactions(found, of="relative")
    assert min(map(min, (t.x for t in relative.data))) >= 0
    assert max(map(max, (t.x for t in relative.data))) <= 1
    assert relative.layout.xaxis.type == "linear"
    with pytest.raises(ValueError, match="`task` is 1, but there are 1 texts"):
        figures.interactions(found, task=1)


def test_clipping_and_ridge_share_an_axis(real):
    clip, ridge = (
        ms.sweep_rank(real.model, real.task, real.svd),
        ms.sweep_ridge(real.model, real.task, real.svd),
    )
    figure = figures.clip_and_ridge(clip, ridge)
    np.testing.assert_allclose(figure.data[0].x, clip.ranks.numpy())
    np.testing.assert_allclose(figure.data[1].x, ridge.effective_directions.numpy(), atol=0.6)
    np.testing.assert_allclose(figure.data[1].y, -ridge.measurement.log_prob.numpy())
    clean = -float(clip.measurement.clean_run.log_prob)
    assert [shape.name for shape in figure.layout.shapes] == [f"clean {clean:.4g}"]
    with pytest.raises(ValueError, match=r"named \['a'\] and those of ridge \['b'\]"):
        figures.clip_and_ridge({"a": clip}, {"b": ridge})
    double = figures.clip_and_ridge({"a": clip, "b": clip}, {"a": ridge, "b": ridge})
    assert [trace.name for trace in double.data] == [
        "a: clipped",
        "a: ridge",
        "b: clipped",
        "b: ridge",
    ]
    np.testing.assert_array_equal(double.data[3].y, figure.data[1].y)
    assert [trace.line.dash for trace in double.data] == [None, "dot", None, "dot"]


def test_the_results_of_several_texts_are_drawn_as_those_of_their_numbers(embedded, meaning):
    texts = [meaning, ms.Task(meaning.tokens[:14], 7)]
    svd = ms.decompose(ms.collect_writes(embedded, texts))
    sweeps = ms.sweep_rank(embedded, texts, svd, [0, 50, 128])
    named = {"text 0": sweeps[0], "text 1": sweeps[1]}
    for draw in (figures.probability, figures.surprise, figures.deltas, figures.delta_map):
        assert draw(sweeps).to_json() == draw(named).to_json()
    rankings = ms.rank_directions(embedded, texts, svd)
    pairs = {f"text {i}": part for i, part in enumerate(rankings)}
    expected = figures.direction_effects(pairs).to_json()
    assert figures.direction_effects(rankings).to_json() == expected


def test_anchors_of_one_rank_stand_apart(embedded, meaning):
    texts = [meaning, ms.Task(meaning.tokens[3:], 7)]
    anchors = ms.overlap_anchors(embedded, texts, [4])
    figure = figures.overlap_anchors(anchors)
    assert [trace.x[0] for trace in figure.data] == [*range(len(anchors.kinds))]
    assert figure.layout.xaxis.title.text == "rank k = 4"
