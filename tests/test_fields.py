from dataclasses import fields, replace
from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch

import mechsvd as ms
from mechsvd.attribution.gradients import GradientBasis, Gradients
from mechsvd.engine.resuming import Loop, Loops
from mechsvd.experiments.direction_writers import DirectionWriters
from mechsvd.experiments.ridge import RidgeSweep
from mechsvd.experiments.token_columns import TokenColumns
from mechsvd.experiments.value_vectors import ValueVectors
from mechsvd.linalg.comparison import Pool
from mechsvd.linalg.moments import Moments
from mechsvd.model.rows import Layout, Place
from mechsvd.model.selfcheck import SelfCheck
from mechsvd.results import _CLASSES, Provenance

SOURCE = Provenance(
    "m", "w", "raw", "float32", "4", "0", ((1, 2, 3),), ("blocks.0.hook_mlp_out",), 0, ("note",)
)
SITES = (ms.Site(0, "attn", "blocks.0.hook_attn_out"), ms.Site(0, "mlp", "blocks.0.hook_mlp_out"))


def tiny_results():
    """One result of each class that can be saved, by name; of a few numbers each."""
    three, whole = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 1, 2])
    sizes, falling, basis = torch.ones(3, 2), torch.tensor([2.0, 1.0]), torch.eye(3)[:, :2]
    clean = ms.Measurement(-sizes[:1], sizes[:1] > 0, sizes[:1], sizes[:1], SITES, source=SOURCE)
    measurement = ms.Measurement(-2 * sizes, sizes > 1, sizes, sizes, SITES, clean, SOURCE, 1e-6)
    sweep = ms.RankSweep(whole, torch.tensor([1, 0]), measurement, SOURCE)
    scores = {"measured": falling, "integrated": falling, "slopes": falling, "projections": falling}
    scores |= {"eigenvalues": -falling, "residuals": falling, "value": 0.5, "baseline": 0.25}
    control = ms.Attribution("probability", "gains", (("gain", (3,)),), basis, **scores)
    contrast = ms.Contrast(
        ("a", "b"), torch.ones(1, 3, 2, 4), torch.ones(1, 2, 4), torch.tensor([0, 0, 1, 1]),
        torch.ones(1, 4) > 0, torch.eye(3)[:, :2].expand(1, 3, 2, 1, 3, 2).clone(), 0.05, "pool",
        1e-6, SOURCE,
    )  # fmt: skip
    estimate = ms.RankingEstimate(
        three, three.double(), torch.tensor([1.0, torch.nan, 2.0]).double(),
        torch.tensor([True, False, False]), 0.5, "1", "log_prob", "nats", 1, 0, 0,
        ("a", "b"), (2, 1), SOURCE,
    )  # fmt: skip
    one = torch.ones(1)
    columns = TokenColumns(
        whole[:1], sizes[:1], sizes[:1], sizes[:1], one, torch.ones(3, 1, 1), torch.ones(3, 1),
        torch.ones(3, 1), ("a", "b"), 0, SOURCE,
    )  # fmt: skip
    writers = DirectionWriters(
        whole[:1], torch.ones(1, 2, 3), SITES, whole, whole, whole, ("a", "b", "c"),
        torch.tensor([True, False]), one, whole[:1], whole[:1], ("head",), whole[:1], whole[:1],
        whole[:1], whole[:1], one, whole[:1], ("not split",), whole[:1], torch.ones(2, 3), 0.1, SOURCE,
    )  # fmt: skip
    values = ValueVectors(
        whole[:1], whole[:1], whole[:1], whole[:1], one, whole[None, :2], (("a", "b"),), whole[:2],
        torch.ones(1, 2), torch.ones(1, 2), 6, SOURCE,
    )  # fmt: skip
    dose = ms.DoseResponse(
        whole[:1],
        one,
        falling,
        sizes[:1, None],
        sizes[:1, None],
        "log_prob",
        "nats",
        1e-6,
        0,
        SOURCE,
    )
    moments = Moments(
        whole[[2, 2]], sizes[:2].double(), torch.eye(2).expand(2, 2, 2).double(), "float32"
    )
    place = Place((0, 2), 3, 9, 0, 1, whole, "ab")
    layout = Layout(8, False, True, (1, 2), 0)
    found = [
        moments,
        place,
        layout,
        ms.WriteStream(moments, SITES, layout, (place,), 64, SOURCE),
        ms.Checkpoint("count", (("n", "3"),), SOURCE, ms.Subspace(basis), True),
        ms.Task(whole, 1, ("a", "b", "c")),
        ms.Writes(torch.ones(2, 3, 4), SITES, whole, whole, whole, ("a", "b", "c"), SOURCE),
        ms.Decomposition(falling, basis, torch.eye(2)[None], 0, SOURCE),
        ms.Subspace(basis, SOURCE),
        measurement,
        sweep,
        RidgeSweep(three, three, measurement, SOURCE),
        ms.Ranking(three, measurement),
        ms.Measurements((measurement,)),
        ms.RankSweeps((sweep,)),
        ms.Rankings((ms.Ranking(three, measurement),)),
        ms.RidgeSweeps((RidgeSweep(three, three, measurement, SOURCE),)),
        ms.CriticalRanks((ms.CriticalRank(sweep, three, 1e-6, 9, "a bar"),)),
        ms.Fit("own text", "pooled", "size", ms.RankSweeps((sweep,)), 3),
        contrast,
        ms.OverlapAnchors(
            ("a",), torch.tensor([2, 3]), *[torch.ones(1, 2)] * 4, (1,), 3, 4, 0, SOURCE
        ),
        Loop("a", 2, (2, 1), (sizes, sizes)),
        Loops((Loop("a", 2, (2,), (sizes,)),), SOURCE),
        ms.AdaptiveSweep(sweep, whole, three.double(), three.double()),
        ms.WorstGains(
            whole,
            torch.ones(1, 3),
            torch.ones(1).double(),
            torch.ones(1, 2).double(),
            "a",
            "b",
            SOURCE,
        ),
        ms.Literature(("below",), *[torch.ones(1, 3).double()] * 3, (6,), 0, SOURCE),
        ms.RandomTextComparison(
            ("a",),
            ("b",),
            torch.ones(1, 2).double(),
            torch.ones(3, 1).double(),
            torch.ones(1).double(),
            torch.ones(1).double(),
            0.01,
            0,
            SOURCE,
        ),
        ms.Faithfulness(
            whole,
            sizes,
            three,
            torch.ones(3, 5),
            three,
            three,
            sizes,
            "log_prob",
            "nats",
            0,
            SOURCE,
        ),
        ms.ContrastSweep((contrast,)),
        ms.Reads(torch.ones(2, 3, 4), SITES, whole, whole, whole, 2, 0, SOURCE),
        ms.ReadWriteAngles(sizes[:2], sizes, SITES, 3, 0, SOURCE),
        ms.LearnedSubspace((ms.Subspace(basis, SOURCE),), falling, three, 0, SOURCE),
        ms.OrderComparison(
            ("a",),
            ("pooled",),
            whole[1:],
            torch.ones(2, 1, 2, 3),
            torch.ones(4, 2, 3),
            whole,
            5,
            0,
            SOURCE,
        ),
        ms.HeldOut((ms.Fit("a", "b", "c", ms.RankSweeps((sweep,)), 3),), whole),
        ms.Baseline(torch.ones(1, 2, 1, 3), SITES, "mean", (), SOURCE),
        ms.OptimalBaseline(
            torch.ones(1, 2, 1, 3),
            SITES,
            "mean",
            (),
            SOURCE,
            sizes[:2],
            falling,
            sizes,
            whole,
            three,
            "nats",
        ),
        ms.BaselineComparison(("a", "b", "c"), sizes, 2, "log_prob", "nats", SOURCE),
        ms.DoseResponse(
            whole, three, falling, sizes[None], sizes[None], "log_prob", "nats", 1e-6, 0, SOURCE
        ),
        columns,
        writers,
        values,
        ms.DirectionCards(
            whole[:1],
            one,
            sizes[:1, :1],
            sizes[:1, :1],
            columns,
            writers,
            values,
            dose,
            whole[None],
            "log_prob",
            "nats",
            SOURCE,
        ),
        ms.CriticalRank(sweep, three, 1e-6, 9, "a bar"),
        estimate,
        ms.RankingEstimates((estimate,)),
        ms.FoldReport(SITES, ("a",), *[three] * 6, ("b", "c"), ("d", "e"), SOURCE),
        ms.Overlap(torch.eye(2), torch.ones(2, 2), torch.ones(2, 2), SOURCE),
        Pool(falling, falling - 1, falling, falling + 1, 0, SOURCE),
        SelfCheck(three, 0.0, (1,), 1.0, 0.0, float("inf"), 1e-5),
        Gradients(sizes, whole, whole, "gains", (("gain", (1, 2)),), SOURCE),
        GradientBasis(three, torch.eye(3), torch.eye(3), "gains", (("gain", (3,)),), SOURCE),
        ms.CurvatureRidge(
            three,
            falling,
            torch.ones(1, 2),
            torch.ones(1, 3),
            torch.ones(1, 3),
            torch.ones(1),
            torch.ones(1),
            0.0,
            "probability",
            "gains",
            SOURCE,
        ),
        ms.Interactions(
            ("a", "b"),
            whole - whole,
            whole,
            whole,
            *[torch.ones(1, 4, 3).double()] * 3,
            *[torch.ones(1, 2).double()] * 2,
            *[torch.ones(1).double()] * 2,
            "probability",
            "gains",
            0,
            SOURCE,
        ),
        ms.Attributions((control,)),
        replace(control, beside=(("random", control),), source=SOURCE),
    ]
    return {type(result).__name__: result for result in found}


@pytest.mark.fault(31, 47)
def test_there_is_a_tiny_result_of_every_class_that_can_be_saved():
    for module in walk_packages(ms.__path__, "mechsvd."):
        import_module(module.name)
    ours = {
        name
        for name, cls in _CLASSES.items()
        if cls.__module__.startswith("mechsvd.") and hasattr(cls, "save")
    }
    assert set(tiny_results()) == ours


@pytest.mark.parametrize("name", sorted(tiny_results()))
def test_a_field_of_another_kind_is_refused_by_name(name):
    result = tiny_results()[name]
    for field in fields(result):
        is_bool = isinstance(getattr(result, field.name), bool)
        for wrong in (object(), [1], torch.ones(1, dtype=torch.complex64), 1 if is_bool else True):
            with pytest.raises((TypeError, ValueError), match=f"`{field.name}` .*(must be|needs)"):
                replace(result, **{field.name: wrong})


@pytest.mark.parametrize("name", sorted(tiny_results()))
def test_a_tensor_with_more_axes_is_refused_by_name(name):
    result = tiny_results()[name]
    for field in (
        field.name
        for field in fields(result)
        if isinstance(getattr(result, field.name), torch.Tensor)
    ):
        with pytest.raises(ValueError, match=rf"`{field}` .*must have (the axes \[|one axis)"):
            replace(result, **{field: getattr(result, field)[None]})


ONE = torch.tensor([1.0])
UNFIT = [
    ("Decomposition", {"singular_values": ONE}, r"`directions` of .* shape \[3, 2\], but its axis `rank` must have size 1, as in"),
    ("Decomposition", {"directions": torch.eye(3)[:2]}, r"`directions` of a Decomposition has shape \[2, 3\]"),
    ("Decomposition", {"layer": "3"}, "`layer` of a Decomposition is str '3', but must be a whole number or None"),
    ("Decomposition", {"layer": -1}, "`layer` of a Decomposition holds -1, but must be 0 or more"),
    ("Subspace", {"basis": 2 * torch.eye(3)}, "orthonormal"),
    ("Writes", {"sites": SITES[:1]}, "`sites` of a Writes has length 1, but must have 2: one for each site"),
    ("Writes", {"pieces": ("a",)}, "`pieces` of a Writes has length 1, but must have 3: one for each token"),
    ("Task", {"pieces": ("a",)}, "`pieces` has 1 texts for 3 tokens"),
    ("Measurement", {"sites": ()}, "`sites` of a Measurement has length 0, but must have 2"),
    ("Measurement", {"clean": tiny_results()["Measurement"]}, "`clean` must have one edit and the 2 scored tokens"),
    ("RankSweep", {"ranks": torch.tensor([1])}, "`measurement` of a RankSweep has length 3, but must have 1: one for each rank"),
    ("RidgeSweep", {"alphas": ONE, "effective_directions": ONE}, "`measurement` of a RidgeSweep has length 3"),
    ("Ranking", {"singular_values": ONE}, "`measurement` of a Ranking has length 3"),
    ("FoldReport", {"sha256": ()}, "`sha256` of a FoldReport has length 0, but must have 2: one for each file"),
    ("RankingEstimate", {"sizes": (3,)}, "`sizes` of a RankingEstimate has length 1, but must have 2: one for each basis"),
    ("CriticalRank", {"margins": ONE}, "`margins` of a CriticalRank has length 1, but must have 3"),
    ("Overlap", {"values": torch.ones(2, 3)}, r"`values` of an Overlap has shape \[2, 3\], but its axis `n` must have size 2"),
    ("Gradients", {"parts": (("gain", (3,)),)}, "`parts` must make up the 2 entries of w, but have 3"),
    ("Attribution", {"parts": (("gain", (-1, -3)),)}, "`parts` must make up the 3 entries of w"),
    ("CurvatureRidge", {"clip_values": torch.ones(1, 2)}, "`clip_values` must have one column more than the 2 directions, but have 2"),
    ("Interactions", {"names": ("a",)}, "`names` of an Interactions has length 1, but must have 2: one for each basis"),
    ("TokenColumns", {"vocabulary": ("a",)}, "`vocabulary` of a TokenColumns has length 1, but must have 2"),
    ("DirectionWriters", {"part_kinds": ()}, "`part_kinds` of a DirectionWriters has length 0, but must have 1"),
    ("ValueVectors", {"texts": ()}, "`texts` of a ValueVectors has length 0, but must have 1"),
    ("DirectionCards", {"directions": torch.tensor([3])}, "`tokens` is of directions .0., but must be of .3."),
    ("Attribution", {"vectors": torch.eye(2), "parts": (("gain", (2,)),)}, "`beside` holds directions 'random' of 3 entries"),
]  # fmt: skip


@pytest.mark.fault(47)
@pytest.mark.parametrize(("name", "change", "message"), UNFIT)
def test_a_result_whose_fields_do_not_fit_each_other_is_refused(name, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        replace(tiny_results()[name], **change)


def test_a_site_counts_layers_from_0_and_is_of_a_known_component():
    for layer, component in ((-1, "mlp"), (0, "resid")):
        with pytest.raises(ValueError, match=f"No site {layer} {component}: layers count from 0"):
            ms.Site(layer, component, "somewhere")


def test_half_precision_none_and_no_columns_are_legitimate():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert ms.Subspace(torch.eye(3, dtype=dtype)).rank == 3
    assert ms.Decomposition(torch.ones(0), torch.ones(3, 0), torch.ones(1, 2, 0)).rank == 0
