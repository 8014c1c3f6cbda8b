"""What removing each entry of w costs, from derivatives at w = 1 or on a path to 0."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechsvd.attribution.curvature import Function, differentiate

COLUMNS = 512  # of Hessian products that are held at once
Order = Literal[1, 2, "path"]


def effects_from(
    function: Function, order: Order, products: int, steps: int, seed: int
) -> Float[Tensor, " rank"]:
    """f(w) − f(w without entry j) for all j, estimated; f is exact at this order or it is not.

    Exact where f is linear in w (order 1), quadratic (order 2, with all products), or a sum of
    functions of one entry each (path); w must be 1 everywhere.
    """
    if order == "path":
        return function.path_gradient(steps).double().cpu()
    curvature = differentiate(function)
    gradient = curvature.gradient.detach().double()
    if order == 1:
        return gradient.cpu()
    entries = len(gradient)
    second = torch.zeros_like(gradient)
    if products >= entries:
        for chosen in torch.arange(entries).split(COLUMNS):
            units = torch.eye(entries)[:, chosen].to(function.point)
            columns = curvature.products(units, function.progress)
            second[chosen.to(second.device)] = (columns * units).sum(0).double()
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(0, 2, (entries, products), generator=generator) - 1
        signs = signs.to(function.point)
        second = (signs * curvature.products(signs, function.progress)).double().mean(dim=1)
    return (gradient - second.detach() / 2).cpu()
