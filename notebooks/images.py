"""Store the notebooks with their outputs, and draw the README's image.

    pip install '.[test,images]' && python notebooks/images.py

It runs every notebook, as after any change of one, and puts a small PNG next to each plotly figure, for
GitHub shows no plotly. That needs a Chrome; readers and tests need none. The address of the repository
comes from pyproject.toml: once there is one, as `Repository = "https://github.com/…"` in a section
`[project.urls]`, the notebooks install from it and have a badge that opens them in Colab.
"""

import base64
import hashlib
import io
import os
import re
import tempfile
from pathlib import Path

import nbformat
import plotly.io as pio
from nbclient import NotebookClient

import mechsvd as ms

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "notebooks" / "images"
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
QUIET = {
    "PLOTLY_RENDERER": "plotly_mimetype",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # bars that are off anyway
}
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{}/blob/main/notebooks/{}.ipynb)"
)


def main():
    """Run and store all notebooks, and sweep one prompt for the README."""
    import kaleido  # here and below: pytest imports this file, to look for doctests

    os.environ |= QUIET
    kaleido.start_sync_server(n=1)  # one Chrome for all figures
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        store(path)
    model = ms.load_model(device="cpu")
    task = ms.Task.from_text(model, ms.SHORTFORM_PROMPTS["meaning"])
    svd = ms.decompose(ms.collect_writes(model, task))
    save("surprise", ms.figures.surprise(ms.sweep_rank(model, task, svd)))


def save(name, figure):
    """One image of the size that the README shows."""
    ms.figures.save_image(figure.update_layout(width=560, height=380), IMAGES / f"{name}.png")


def store(path):
    """Run one notebook in an empty folder, and store it with what it showed."""
    notebook = nbformat.read(path, as_version=4)
    with_address(notebook, path.stem, repository())
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path.name} warns: {output.text}")
            if PLOTLY in output.get("data", {}):
                output.data[PNG] = as_png(output.data[PLOTLY])
    notebook.metadata["language_info"] = {"name": "python"}  # no version, which changes
    notebook.metadata["sources"] = sources_of(notebook.cells)
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def as_png(figure):
    """A plotly figure, as JSON, as a small image in base64."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure = pio.from_json(pio.json.to_json_plotly(figure))
    drawn.write(figure.to_image("png", width=620, height=360))
    Image.open(drawn).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def repository():
    """The repository's address in pyproject.toml; empty while there is none."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.*)"', text, re.MULTILINE)
    return found[1] if found else ""


def with_address(notebook, name, address):
    """Put the address, and the badge if it is on GitHub, in a notebook's first two cells."""
    title, install = notebook.cells[:2]
    text = title.source[title.source.index("# ") :]
    owner = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?/?", address)
    title.source = f"{BADGE.format(owner[1], name)}\n\n{text}" if owner else text
    install.source = re.sub(
        r'(?m)^REPOSITORY = "[^"]*"', f'REPOSITORY = "{address}"', install.source
    )


def sources_of(cells):
    """What tells whether stored outputs are those of the cells as they are."""
    joined = "\0".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return hashlib.sha256(joined.encode()).hexdigest()


if __name__ == "__main__":
    main()
