"""The sentences of the report say what the numbers say: checked against numbers computed here in another way."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import mechsvd as ms
from mechsvd.experiments.contrast_results import Contrast
from mechsvd.report import findings, findings_together, top
from mechsvd.report.sections import MANY, SECTIONS, described
from mechsvd.report.study import SIGNED, compare, study_task, with_held_out


@pytest.fixture(scope="module")
def studies(embedded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {
            n: ms.Task.from_text(embedded, ms.SHORTFORM_PROMPTS[n], max_new_tokens=10)
            for n in ("meaning", "launch")
        }
        starts = {"own": torch.tensor([0, 5]), "none": torch.tensor([0])}
        return [study_task(embedded, name, task, starts) for name, task in made.items()]


@pytest.fixture(scope="module")
def comparison(embedded, studies):
    return compare(embedded, studies)


def test_how_many_directions_carry_a_share(studies):
    for found in studies:
        squares = np.square(found.pooled.singular_values.double().numpy())
        expected = next(k for k in range(1, 129) if squares[:k].sum() >= 0.9 * squares.sum())
        assert findings.directions_for(found, 0.9) == expected
        said = findings.spectrum([found])
        assert f"Here {expected} of 128 directions carry 90 %" in said
        inside = (
            (found.writes.values.double() @ found.pooled.directions[:, :expected].double())
            .square()
            .sum(dim=(1, 2))
        )
        site, share = found.writes.sites[int(inside.argmax())], float(inside.max() / inside.sum())
        assert findings.owner(found, expected) == (site, pytest.approx(share))
        others = [i for i, other in enumerate(found.writes.sites) if other != site]
        rest = np.linalg.svd(found.writes.values[others].flatten(0, 1).double().numpy())[1] ** 2
        count = next(k for k in range(1, 129) if rest[:k].sum() >= 0.9 * rest.sum())
        assert f"the rest need {count} directions for 90 %" in said
        parts = (found.writes.values.double() @ found.pooled.directions[:, :3].double()).square()
        own = parts.sum(dim=-1)[found.writes.sites.index(site)]
        token = found.writes.pieces[int(own.argmax())]
        assert f"{own.sum() / parts.sum():.0%}, {site} at {token!r} ({found.name})" in said


def lasting(table, column="rank"):
    """The smallest number from which the summed KL divergence stays within 1 nat, from a table."""
    far = table[column][table["kl_divergence"] * 10 > 1.0]  # ten scored tokens
    return table[column][table[column] > far.max()].min()


def test_from_which_rank_on_the_text_stays_near(studies):
    said = findings.clipping(studies)
    for found in studies:
        assert len(found.task.continuation) == 10
        expected = lasting(found.sweep.to_pandas())
        assert findings.lasting_rank(found.sweep) == expected
        by_site = lasting(found.by_site.to_pandas())
        assert f"{expected} ({found.name})" in said.partition("with a basis per site")[0]
        assert f"{by_site} ({found.name})" in said.partition("with a basis per site")[2]
        assert by_site < expected


def test_the_sentence_on_directions_names_the_most_needed_one(studies):
    divergences = {s.name: s.ranking.to_pandas()["kl_divergence"] for s in studies}
    name = max(divergences, key=lambda name: divergences[name].max())
    direction, size = divergences[name].idxmax(), divergences[name].max()
    said = findings.directions(studies)
    assert f"direction {direction} ({name}: {size:.3g} nats per token)" in said
    for column, change in (("kl_divergence", abs), ("effect", abs), ("effect", lambda x: x)):
        found = sorted(
            t["singular_value"].corr(change(t[column]), method="spearman")
            for t in (s.ranking.to_pandas() for s in studies)
        )
        assert f"{found[0]:.2f} to {found[1]:.2f}" in said


def test_cards_are_of_the_largest_and_of_the_most_needed_directions(studies):
    for found in studies:
        damage = found.ranking.measurement.kl_divergence
        needed = [j for j in damage.argsort(descending=True).tolist() if j > 1][:2]
        assert found.cards.directions.tolist() == [0, 1, *needed]
        own = found.cards.kl_divergences[0]
        torch.testing.assert_close(own, damage[found.cards.directions], atol=1e-5, rtol=1e-3)


def test_the_sentence_on_cards_gives_the_agreement_with_themselves_and_with_others(studies):
    own, other, told = [], [], 0
    for found in studies:
        tokens = found.cards.tokens
        both = [
            [
                spearmanr(tokens.as_written(i, "read"), tokens.as_written(j, "measured")).statistic
                for j in range(4)
            ]
            for i in range(4)
        ]
        own.append(np.trace(both) / 4)
        other.append((np.sum(both) - np.trace(both)) / 12)
        orders = [*itertools.permutations(range(4))]
        sums = [sum(both[i][j] for i, j in enumerate(order)) for order in orders]
        told += np.mean([total >= np.trace(both) - 1e-9 for total in sums]) <= 0.05
    said = findings.described(studies)
    assert f"correlation of {own[0]:.3g} (meaning), {own[1]:.3g} (launch); with" in said or (
        f"correlation of {own[0]:.3g} (meaning) and {own[1]:.3g} (launch); with" in said
    ), said
    assert f"{other[0]:.3g} (meaning)" in said
    assert f"For {told} of 2 prompts" in said
    without = [dataclasses.replace(found, cards=None) for found in studies]
    assert described(without) == ""
    assert described(studies).count('<section class="msc">') == 8


def test_the_orders_are_listed_by_how_few_directions_they_need(studies):
    said = findings.orders(studies)
    means = {
        o: np.mean([findings.lasting_rank(s.sweeps[o]) for s in studies]) for o in studies[0].sweeps
    }
    places = [said.index(f"({order})") for order in sorted(means, key=means.get)]
    assert places == sorted(places)
    assert f"{means['singular value']:.0f} (singular value)" in said
    assert f"{means[SIGNED]:.0f} (the shortform's signed effect)" in said
    assert "In the signed effect tokens cancel" in said


def test_the_sentence_on_ridge_names_the_smallest_lasting_number(studies):
    said = findings.ridge(studies)
    for found in studies:
        expected = lasting(found.ridge.to_pandas(), "effective_directions")
        assert findings.lasting_number(found.ridge) == pytest.approx(expected)
        assert (
            f"{expected:.0f} where clipping needs {findings.lasting_rank(found.sweep)} ({found.name})"
            in said
        )
    left = []
    for found in studies:
        gains = found.pooled.singular_values.double().square()
        table = found.ridge.to_pandas()
        alpha = table.alpha[table.effective_directions == findings.lasting_number(found.ridge)]
        left.append(int((gains / (gains + float(alpha.iloc[0])) > 0.1).sum()))
    span = f"{min(left)} to {max(left)}" if min(left) < max(left) else f"{left[0]}"
    assert f"a sum of gains: {span} directions still have a gain above 0.1 there" in said
    never = dataclasses.replace(
        studies[0].ridge, measurement=far_from_clean(studies[0].ridge.measurement)
    )
    assert findings.lasting_number(never) is None


def far_from_clean(measurement):
    return dataclasses.replace(measurement, kl_divergences=measurement.kl_divergences + 100)


def test_the_sentence_on_attribution_counts_estimates_and_sums_scores(studies):
    said = findings.attribution(studies)
    for found in studies:
        table = found.attribution.to_pandas()
        near = ((table.quadratic - table.measured).abs() <= 0.1 * table.measured.abs())[
            ~table.is_noise
        ].mean()
        assert findings.share_within(found.attribution, "quadratic") == pytest.approx(near)
    shares = sorted(round(100 * findings.share_within(s.attribution, "quadratic")) for s in studies)
    assert f"for {shares[0]}" in said
    sums = sorted(float(s.attribution.bases["gradients"].share.sum()) for s in studies)
    assert f"{sums[-1]:.2g} (gradients)".replace("-", "−") in said
    assert "of all directions" in said
    few = [dataclasses.replace(s, attribution=first_components(s.attribution)) for s in studies]
    assert "of the largest directions" in findings.attribution(few)


def first_components(found):
    columns = ("eigenvalues", "residuals", "projections", "slopes", "integrated", "measured")
    return dataclasses.replace(
        found, vectors=found.vectors[:, :5], **{name: getattr(found, name)[:5] for name in columns}
    )


def test_the_critical_ranks_are_those_of_an_exhaustive_search(embedded, studies):
    for found in studies:
        certain = ms.critical_rank(embedded, found.task, found.pooled, exhaustive=True)
        assert found.critical.rank == certain.rank
        said = findings.critical_ranks(studies)
        assert f"{certain.rank} ({found.name})" in said
        table = found.sweep.to_pandas().set_index("rank")
        assert f"{table.absolute_change[certain.rank]:.3g} nats ({found.name})" in said
        assert f"{lasting(found.sweep.to_pandas())} ({found.name})" in said.partition("lasting")[2]
        assert found.subspace.rank == certain.rank


def test_texts_are_those_of_generate(embedded, studies):
    for found in studies:
        for text in found.texts:
            assert text.ranks[:2] == (None, found.critical.rank)
            assert list(text.ranks[1:]) == sorted(text.ranks[1:], reverse=True)
            assert findings.is_clean(text, 0)
        rank, task = found.texts[1].ranks[2], found.texts[1].tasks[2]
        length = len(found.task.continuation)
        said = ms.generate(
            embedded, "", ms.keep(found.pooled.subspace(rank)), max_new_tokens=length
        )
        assert task.text()[1].removesuffix("</s>") == said


def test_overlaps_are_stated_and_nothing_is_concluded(comparison):
    shared, ratio = float(comparison.overlap.values[0, 1]), float(comparison.overlap.ratio[0, 1])
    said = findings_together.several(comparison)
    assert (
        f"share {shared:.1f} dimensions, {ratio:.3f} times what random subspaces of the same ranks share"
        in said
    )
    for word in ("claim", "hold", "deviation", "z-score"):
        assert word not in said
    angles = comparison.angles["meaning", "launch"]
    assert float(angles.cos().square().sum()) == pytest.approx(
        float(comparison.overlap.values[0, 1]), rel=1e-6
    )


def test_held_out_sentences_have_intervals_over_the_texts(studies, comparison):
    said = findings_together.held_out(comparison)
    table = comparison.held_out.summary()
    own = table[(table.fitted == "own text") & (table.basis == "pooled")].iloc[0]
    expected = np.mean([lasting(s.sweep.to_pandas()) for s in studies])
    assert own["mean"] == pytest.approx(expected)
    assert f"is {own['mean']:.0f} ({own['low']:.0f} to {own['high']:.0f}) with a prompt" in said
    ranks = {
        fitted: comparison.held_out.fit(fitted).lasting_ranks()
        for fitted in ("own text", "other texts")
    }
    saved = float((ranks["other texts"] - ranks["own text"]).double().mean())
    assert f"measured on save {saved:.0f} (" in said


def test_other_directions_stand_next_to_a_texts_own_in_its_figures(studies, comparison):
    (found, _) = with_held_out(studies, comparison.held_out)
    assert list(found.fits) == ["own text", "other texts", "one other text", "random directions"]
    fit = comparison.held_out.fit("other texts").sweeps[0]
    drawn = {trace.name: trace for trace in ms.figures.surprise(found.fits).data}
    assert list(drawn) == list(found.fits)
    assert list(drawn["other texts"].y) == pytest.approx((-fit.measurement.log_prob).tolist())
    ranks = ms.figures.probability({"a": found.sweep, "b": fit}).data[1].x
    assert list(ranks) == fit.ranks.tolist()


def test_of_special_directions_numbers_are_given_and_no_need_is_claimed():
    """A contrast whose effects on the own group are ten times those on others: it may be energy."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 2, 12, generator=generator, dtype=torch.float64) + 0.5
    group = torch.arange(12) % 2
    own = group == torch.arange(2)[:, None]
    held = (torch.arange(12) // 2 % 2 == torch.arange(2)[:, None]).contiguous()

    def contrast(factor):
        values = noise.clone()
        values[:, 0] *= torch.where(own, factor, 1.0)
        values = values.where(held[:, None, None], torch.nan)
        null = noise[:, 0].where(held[:, None], torch.nan)
        basis = torch.eye(6)[:, :2].expand(2, 3, 2, 1, 6, 2).contiguous()
        return Contrast(("a", "b"), values, null, group, held, basis, 0.05, "pool", 0.0)

    for factor in (1.0, 10.0):
        said, first = findings_together.special(contrast(factor)), top._special(contrast(factor))
        assert "it does not follow that texts of one kind need them" in said
        assert "cannot be told from chance, nor from energy: " in first.sentence
        assert not first.is_told
        low = contrast(factor).summary(0.99).query("method == 'special' and group == 'all'").low
        assert (float(low.iloc[0]) > 1) == (factor > 1)  # what was claimed by
        assert f"({float(low.iloc[0]):.3g} to " in said


def test_of_a_model_that_learnt_nothing_and_random_tokens_no_sentence_claims_anything(embedded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ms.reinitialised(embedded, 1)
        tasks = [ms.random_tokens(model, ms.Task(torch.arange(12), 7), seed) for seed in (1, 2)]
        start = {"none": torch.tensor([0])}
        found = [study_task(model, f"text-{i}", task, start) for i, task in enumerate(tasks)]
        together = compare(model, found)
    said = [part.measured(found) for part in SECTIONS]
    said += [
        findings.texts(found),
        findings_together.held_out(together),
        findings_together.several(together),
    ]
    first = top.top_of(found, together, None)
    assert not any(one.is_told for one in first.found)
    said += [one.sentence for one in first.found]
    for sentence in said:
        for claim in (
            "than random tokens",
            "Directions of other texts serve",
            "So there are",
            "significant",
            "proves",
            "shows that",
        ):
            assert claim not in sentence
    assert sum("cannot be told from chance" in sentence for sentence in said) == 5
    assert len(first.untold) == 6  # five questions, and that of other texts


def test_sentences_follow_the_numbers_and_not_the_other_way(studies):
    """Each count in a sentence, counted here again from the tables."""
    effects = [s.ranking.to_pandas() for s in studies]
    gains = sorted(int(((t["effect"] < 0) & ~t["is_noise"]).sum()) for t in effects)
    silent = sorted(int(t["is_noise"].sum()) for t in effects)
    said = findings.directions(studies)
    assert (
        f"Removing any one of {gains[0]} to {gains[1]} directions" in said
        or f"any one of {gains[0]} directions" in said
    )
    assert (
        f"effect of {silent[0]} is no larger" in said
        or f"effect of {silent[0]} to {silent[1]} is no larger" in said
    )
    same = sum(
        s.texts[0].tasks[1].tokens.tolist() == s.texts[0].tasks[0].tokens.tolist() for s in studies
    )
    assert f"is the clean one for {same} of 2 prompts, and" in findings.texts(studies)
    crossings = sorted(len(s.critical.crossings) for s in studies)
    assert (
        f"{crossings[0]} to {crossings[1]} times" in findings.critical_ranks(studies)
        or crossings[0] == crossings[1]
    )
    once = [s for s in studies if len(s.critical.crossings) == 1] or [studies[0]]
    assert ("once each" in findings.critical_ranks(once)) == (len(once[0].critical.crossings) == 1)


def with_overlap(comparison, studies):
    return dataclasses.replace(comparison, overlap=ms.overlap([s.subspace for s in studies]))


def test_without_a_critical_rank_nothing_is_claimed(studies, comparison):
    first, second = studies
    never = dataclasses.replace(first.critical, margins=first.critical.margins - 1e6)
    without = dataclasses.replace(first, critical=never)
    assert "none (meaning)" in findings.critical_ranks([without, second])
    assert "of 1 prompts (1 prompts have none" in findings.texts([without, second])
    assert without.subspace.rank == without.pooled.rank
    whole = with_overlap(comparison, [without, without])
    assert "Here this test cannot tell" in findings_together.several(whole)
    mixed = with_overlap(comparison, [without, second, first])
    assert "in the 1 of 3 pairs where neither is all or nothing" in findings_together.several(mixed)


def test_a_rank_that_is_near_clean_by_chance_does_not_last(studies):
    """Near at rank 2, far at 3, near from 4 on: it is 4 that lasts, and none where the last is far."""
    sweep = studies[0].sweep
    clean = sweep.measurement.clean_run.log_probs

    def lasting(distances):
        count = clean.shape[1]
        columns = {name: getattr(sweep.measurement, name)[: len(distances)] for name in COLUMNS}
        divergences = torch.tensor(distances)[:, None].expand(-1, count) / count
        measurement = dataclasses.replace(
            sweep.measurement, **columns, kl_divergences=divergences.contiguous()
        )
        ranks = torch.arange(len(distances))
        return findings.lasting_rank(
            dataclasses.replace(sweep, ranks=ranks, measurement=measurement)
        )

    assert lasting([9.0, 5.0, 0.5, 3.0, 0.2, 0.1]) == 4
    assert lasting([0.0, 0.0, 0.0]) == 0
    assert lasting([0.0, 0.0, 2.0]) is None


COLUMNS = ("log_probs", "is_greedy", "orig_deltas", "kept_deltas")


def test_many_prompts_have_pages_of_their_own_and_sentences_of_their_spread(
    embedded, studies, tmp_path
):
    many = [dataclasses.replace(studies[i % 2], name=f"text-{i}") for i in range(MANY + 1)]
    ranks = sorted(s.critical.rank for s in many)
    said = findings.critical_ranks(many)
    middle = np.median(ranks)
    assert f"{ranks[0]} to {ranks[-1]} (median {middle:.4g}, {len(many)} prompts)" in said
    from mechsvd.report.pages import write_report

    page = write_report(many, ms.self_check(embedded), tmp_path)
    content = page.read_text()
    for study in many:
        (own,) = tmp_path.glob(f"report-data/*/{study.name}/figures.html")
        assert str(own.relative_to(tmp_path)) in content
        assert "../plotly.min.js" in own.read_text()
        assert len(own.read_text()) < 2_000_000
    assert content.count('class="plot"') == 10
    assert content.count('class="plot wide"') == 3  # heat maps of all texts
    assert page.stat().st_size < 8_000_000


def test_the_top_has_five_sentences_with_intervals_and_nulls(studies, comparison):
    found = top.top_of(studies, comparison, None)
    assert len(found.found) == 5
    assert all(one.sentence.count(". ") == 0 for one in found.found)  # one sentence each
    ranks = {
        fitted: comparison.held_out.fit(fitted, order=order).lasting_ranks().double()
        for fitted, order in (
            ("own text", "singular value"),
            ("other texts", "singular value"),
            ("random directions", "random"),
        )
    }
    said = found.found[1]
    saved = float((ranks["random directions"] - ranks["other texts"]).mean())
    more = float((ranks["other texts"] - ranks["own text"]).mean())
    assert (
        f"against {ranks['random directions'].mean():.3g} random ones, {saved:.3g} ("
        in said.sentence
    )
    assert f"that is {more:.3g} (" in said.sentence
    assert "p = 0.5 (2 texts can show 0.5 at best)" in said.sentence  # of all four sign patterns
    assert not said.is_told
    untold = [one for one in found.found if not one.is_told]
    assert [line[-3:] for line in found.untold[: len(untold)]] == [
        "(1)",
        "(2)",
        "(3)",
        "(4)",
        "(5)",
    ]


def test_directions_of_others_are_told_where_every_text_says_so():
    """Nine texts that all save: the p-value is 2 / 2⁹."""
    few = {"own text": 50, "other texts": 90, "random directions": 110}
    ranks = {fitted: (rank + torch.arange(9) % 3).double() for fitted, rank in few.items()}
    said = top._of_others(ranks, 128)
    assert said.is_told
    assert "serve better than random ones: 91 (" in said.sentence
    assert "20 (20 to 20) saved, p = 0.0039; that is 40 (40 to 40) more" in said.sentence


def test_of_one_text_the_top_describes_and_says_what_cannot_be_told(studies):
    found = top.top_of(studies[:1], None, None)
    one = studies[0]
    assert len(found.found) == 5
    assert not any(sentence.is_told for sentence in found.found)
    assert "how many directions another text needs" in found.untold[0]
    first, site, spread, trend, crossing = (sentence.sentence for sentence in found.found)
    random = lasting(one.sweeps["random"].to_pandas())
    assert f"needs {lasting(one.sweep.to_pandas())} of 128 of its own" in first
    assert f"against {random} of the same directions in random order" in first
    assert f"needs {lasting(one.by_site.to_pandas())} per site" in site
    squares = np.square(one.pooled.singular_values.double().numpy())
    assert f"Direction 0 carries {squares[0] / squares.sum():.0%}" in spread
    assert f"against {1 / 128:.1%} and 116 if all directions were equal" in spread
    table = one.ranking.to_pandas()
    value = spearmanr(table.singular_value, table.kl_divergence).statistic
    half = 1.96 * 1.03 / np.sqrt(125)
    low, high = (np.tanh(np.arctanh(value) + side * half) for side in (-1, 1))
    assert f"is {value:.2f} ({low:.2f} to {high:.2f}), against ±{1.96 / np.sqrt(127):.2f}" in trend
    assert f"Its critical rank is {one.critical.rank} of 128" in crossing
