"""What second derivatives cost: a dense Hessian of gains, single products, and 20 eigenpairs over all weights; prints three tables.

    python -m tests.benchmarks.curvature [stories260k directory]

Everything is of one function, the log-probability of 20 tokens, and the ways are run in turn, so that a busy machine slows all alike.
The last table has rows for scipy's `eigsh` over the same products and, where it is installed (`pip install hessian-eigenthings`), for
hessian-eigenthings, with full reorthogonalisation (its default leaves it out for so many steps) over its own products and over ours.
Residuals are measured for all of them alike, by one more exact product a pair.
"""

import logging
import statistics
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

import mechsvd as ms
from mechsvd.attribution.curvature import Function, differentiate, eigenpairs
from mechsvd.attribution.objective import objective_over
from mechsvd.engine.session import open_session
from mechsvd.model.evaluation import evaluation
from tests.benchmarks.machine import machine_line, timed
from tests.benchmarks.models import STORIES

PAIRS, TOLERANCE = 20, 1e-4


def main():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model = ms.load_model(Path(sys.argv[1]) if len(sys.argv) > 1 else STORIES, device="cpu")
    task = ms.Task.from_text(model, "Once upon a time, there was", max_new_tokens=20)
    print(f"{machine_line()}, scipy {version('scipy')}, mechsvd {ms.__version__}")
    svd = ms.decompose(ms.collect_writes(model, task))
    with evaluation(model, gradients=True):
        dense(model, task, svd)
        products(model, task)
        lanczos(model, task)


def function_over(model, task, over):
    """The log-probability as a function of w, in rows as many as the library would take."""
    with open_session(model, [task], gradients=True) as session:
        f = objective_over(session, task, over)
        return Function(
            lambda rows: f.log_probs(rows).sum(dim=-1),
            f.point,
            session.rows_per_pass(task),
            session.halve(task),
        )


def dense(model, task, svd):
    """The whole Hessian of the gains: column by column from plain hooks, by a fresh double backward or on one kept graph."""
    names, v = [site.hook_name for site in ms.find_sites(model)], svd.directions
    tokens, unit = task.tokens[None], torch.eye(svd.rank)

    def graph():
        gains = torch.ones(svd.rank, requires_grad=True)
        edit = lambda x, hook: (x @ v * gains) @ v.T
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, edit) for name in names])
        log_probs = logits[0, task.scored].log_softmax(-1).gather(-1, task.continuation[:, None])
        return torch.autograd.grad(log_probs.sum(), gains, create_graph=True)[0], gains

    def fresh():
        return torch.stack(
            [torch.autograd.grad(slope, gains, e)[0] for e in unit for slope, gains in [graph()]]
        )

    def kept():
        slope, gains = graph()
        return torch.stack(
            [torch.autograd.grad(slope, gains, e, retain_graph=True)[0] for e in unit]
        )

    def ours():
        return differentiate(function_over(model, task, svd)).hessian

    seconds, found = in_turn({"fresh": fresh, "kept": kept, "ours": ours}, repeats=9)
    differs = max(
        float((found[name] - found["fresh"]).abs().max() / found["fresh"].abs().max())
        for name in found
    )
    print(
        f"\n| the whole Hessian of {svd.rank} gains (differences {differs:.0e} of the largest entry) | seconds | times as fast as each |"
    )
    print("| --- | --- | --- |")
    labels = {
        "fresh": "64 fresh double backwards",
        "kept": "64 products on one kept graph",
        "ours": "mechsvd, columns batched",
    }
    for name, label in labels.items():
        faster = (
            ""
            if name != "ours"
            else f"{ratio(seconds, 'fresh'):.1f} and {ratio(seconds, 'kept'):.1f}"
        )
        print(f"| {label} | {statistics.median(seconds[name]):.3f} | {faster} |")


def products(model, task):
    """One Hessian-vector product over all weights, in units of one gradient."""
    function = function_over(model, task, "*")
    curvature = differentiate(function)
    vectors = torch.randn(len(function.point), 16, generator=torch.Generator().manual_seed(0))
    point = function.point.clone().requires_grad_()

    def gradient():
        return torch.autograd.grad(function.values(point[None])[0], point)[0]

    def forward_over_reverse():
        slope = torch.func.grad(lambda w: function.values(w[None])[0])
        return torch.func.jvp(slope, (function.point,), (vectors[:, 0],))[1]

    ways = {
        "a gradient": gradient,
        "the graph of the gradient": lambda: differentiate(function).gradient.detach(),
    }
    ways |= {"a product, forward over reverse": forward_over_reverse}
    ways |= {"a product on the kept graph": lambda: curvature.products(vectors[:, :1])}
    ways |= {
        f"{n} products together": lambda n=n: curvature.products(vectors[:, :n]) for n in (4, 16)
    }
    seconds, _ = in_turn(ways, repeats=15)
    print(
        f"\n| over all {len(function.point):,} weights | milliseconds | for one, in gradients |\n| --- | --- | --- |"
    )
    for name, taken in seconds.items():
        count = int(name.split()[0]) if name[0].isdigit() else 1
        milliseconds = 1000 * statistics.median(taken)
        print(
            f"| {name} | {milliseconds:.1f} | {milliseconds / count / 1000 / statistics.median(seconds['a gradient']):.2f} |"
        )


def lanczos(model, task):
    """The 20 eigenpairs largest in size over all weights."""
    function, counts = function_over(model, task, "*"), {}
    entries = len(function.point)

    def counted(name, curvature):
        counts[name] = 0

        def product(v):
            found = curvature.products(torch.as_tensor(v, dtype=torch.float32).reshape(entries, -1))
            counts[name] += found.shape[1]
            return found

        return product

    def ours():
        curvature = differentiate(function)
        found = eigenpairs(curvature, PAIRS, tolerance=TOLERANCE, max_products=1000, seed=0)
        counts["mechsvd"] = found.products
        return found.values, found.vectors

    def scipys():
        from scipy.sparse.linalg import LinearOperator, eigsh

        product = counted("scipy eigsh", differentiate(function))
        operator = LinearOperator(
            (entries, entries), matvec=lambda v: product(v)[:, 0].numpy(), dtype=np.float32
        )
        start = np.random.default_rng(0).standard_normal(entries).astype(np.float32)
        values, vectors = eigsh(operator, PAIRS, which="LM", tol=TOLERANCE, v0=start)
        return torch.from_numpy(values).double(), torch.from_numpy(vectors)

    ways = {"mechsvd": ours, "scipy eigsh": scipys} | eigenthings(
        model, task, function, counted, counts
    )
    seconds, found = in_turn(ways, repeats=5)
    exact = differentiate(function)
    print(
        f"\n| {PAIRS} eigenpairs of {entries:,} weights | seconds | products | worst residual / abs(λ) | pairs within {TOLERANCE:g} |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, (values, vectors) in found.items():
        residuals = (exact.products(vectors) - vectors * values.to(vectors)).norm(
            dim=0
        ) / values.abs()
        taken = statistics.median(seconds[name])
        print(
            f"| {name} | {taken:.2f} | {counts[name]} | {float(residuals.max()):.1e} | {int((residuals <= TOLERANCE).sum())} |"
        )


def eigenthings(model, task, function, counted, counts):
    """The same by hessian-eigenthings, where it is installed: over our products, and over its own operator."""
    try:
        name = f"hessian-eigenthings {version('hessian-eigenthings')}"
    except PackageNotFoundError:
        return {}
    from hessian_eigenthings import HessianOperator, LambdaOperator
    from hessian_eigenthings import lanczos as their_lanczos

    weights = list(model.parameters())

    def log_prob(model, tokens):
        logits = model.run_with_hooks(tokens, fwd_hooks=[])
        return logits[0, task.scored].log_softmax(-1).gather(-1, task.continuation[:, None]).sum()

    def solve(operator, steps):
        found = their_lanczos(
            operator, k=PAIRS, max_iter=steps, tol=TOLERANCE, reorthogonalize=True, seed=0
        )
        return found.eigenvalues.double(), found.eigenvectors.mT if found.eigenvectors.shape[
            0
        ] == PAIRS else found.eigenvectors

    def over_ours(label, steps):
        product = counted(label, differentiate(function))
        return solve(LambdaOperator(lambda v: product(v)[:, 0], len(function.point)), steps)

    def over_its_own(label):
        counts[label] = 75
        for weight in weights:
            weight.requires_grad = True
        try:
            return solve(HessianOperator(model, [task.tokens[None]], log_prob), 75)
        finally:
            for weight in weights:
                weight.requires_grad = False

    labels = [
        f"{name}, its own products, 75 steps",
        f"{name}, our products, 75 steps",
        f"{name}, our products, 90 steps",
    ]
    return {
        labels[0]: lambda: over_its_own(labels[0]),
        labels[1]: lambda: over_ours(labels[1], 75),
        labels[2]: lambda: over_ours(labels[2], 90),
    }


def in_turn(ways, repeats):
    """Seconds of every way, run one after the other again and again, and what each gave."""
    seconds, found = {name: [] for name in ways}, {}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            taken, found[name] = timed(way)
            seconds[name].append(taken)
    return seconds, found


def ratio(seconds, other):
    """How many times as fast ours is, as the median over the turns."""
    return statistics.median(a / b for a, b in zip(seconds[other], seconds["ours"], strict=True))


if __name__ == "__main__":
    main()
