"""Draw the README's images again: `python notebooks/images.py`, with kaleido and a Chrome (`pip install '.[images]'`)."""

from pathlib import Path

import torch

import mechsvd as ms

IMAGES = Path(__file__).parent / "images"


def main():
    """Run the four prompts on the embedded model and save the main figures."""
    model = ms.load_model(device="cpu")
    subspaces = {}
    for name, prompt in ms.SHORTFORM_PROMPTS.items():
        task = ms.Task.from_text(model, prompt)
        svd = ms.decompose(ms.collect_writes(model, task))
        found = ms.critical_rank(model, task, svd, exhaustive=True)
        subspaces[name] = svd.subspace(found.rank)
        if name == "meaning":
            draw_one(model, task, svd, found)
    save(
        "overlap_map", ms.figures.overlap_map(ms.overlap(list(subspaces.values())), list(subspaces))
    )


def draw_one(model, task, svd, found):
    """The figures of one prompt."""
    ranking = ms.rank_directions(model, task, svd)
    orders = {
        "singular value": ms.order_by_singular_value(svd),
        "effect": ms.order_by_effect(ranking),
        "compromise": ms.order_by_compromise(svd, ranking),
        "random": ms.order_at_random(svd),
    }
    save("singular_values", ms.figures.singular_values(svd, log=True))
    save("surprise", ms.figures.surprise(found.sweep))
    save("direction_effects", ms.figures.direction_effects(ranking))
    save(
        "race_of_orders",
        ms.figures.race_of_orders(
            {n: ms.sweep_rank(model, task, svd, order=o) for n, o in orders.items()}
        ),
    )
    save("critical_rank", ms.figures.margins(found))
    save("clip_and_ridge", ms.figures.clip_and_ridge(found.sweep, ms.sweep_ridge(model, task, svd)))
    tasks = [ms.Task.from_text(model, prompt) for prompt in ms.SHORTFORM_PROMPTS.values()]
    gradients = ms.gradient_basis(ms.collect_gradients(model, tasks, svd))
    bases = {"singular directions": torch.eye(svd.rank), "gradients": gradients}
    save(
        "accumulated_scores",
        ms.figures.accumulated_scores(ms.hessian_attribution(model, task, svd, bases=bases).bases),
    )


def save(name, figure):
    """One image of the size that the README shows."""
    ms.figures.save_image(figure.update_layout(width=560, height=380), IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
