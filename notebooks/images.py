"""Draw the README's image again: `python notebooks/images.py`, with kaleido and a Chrome (`pip install '.[images]'`)."""

from pathlib import Path

import mechsvd as ms

IMAGES = Path(__file__).parent / "images"


def main():
    """Sweep one prompt on the embedded model and save the curve."""
    model = ms.load_model(device="cpu")
    task = ms.Task.from_text(model, ms.SHORTFORM_PROMPTS["meaning"])
    svd = ms.decompose(ms.collect_writes(model, task))
    save("surprise", ms.figures.surprise(ms.sweep_rank(model, task, svd)))


def save(name, figure):
    """One image of the size that the README shows."""
    ms.figures.save_image(figure.update_layout(width=560, height=380), IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
