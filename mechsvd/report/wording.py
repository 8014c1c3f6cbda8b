"""Numbers of several prompts in words."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from mechsvd.report.study import Study

LISTED = 6  # with more prompts, a sentence gives their spread
CANNOT = "cannot be told from chance"


def sizes(studies: Sequence[Study]) -> str:
    """How many directions the prompts have."""
    return span(s.pooled.rank for s in studies)


def listed(
    studies: Sequence[Study], values: Sequence[int | float | str | None], unit: str = ""
) -> str:
    """Each value with its prompt's name; of many prompts, how they are spread."""
    numbers = sorted(value for value in values if isinstance(value, int | float))
    if len(studies) > LISTED and len(numbers) == len(values):
        low, *_, high = numbers
        return (
            f"{low:.4g} to {high:.4g}{unit} (median {median(numbers):.4g}, {len(values)} prompts)"
        )
    texts = [or_none(value, unit) for value in values]
    if len(studies) > LISTED:
        common, times = Counter(texts).most_common(1)[0]
        return f"{common} for {times} of {len(values)} prompts"
    items = [f"{text} ({s.name})" for s, text in zip(studies, texts, strict=True)]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def span(values: Iterable[int | float], form: str = "g") -> str:
    """The smallest and the largest of some numbers; one if they look the same."""
    low, *_, high = sorted([*values] * 2)
    return (
        f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"
    )


def or_none(value: int | float | str | None, unit: str = "") -> str:
    """A value with its unit, or "none"."""
    if value is None:
        return "none"
    return f"{value:.3g}{unit}" if isinstance(value, float) else f"{value}{unit}"
