r"""Gradients of an energy at the points of a bank: by autograd, or from values alone.

The denoising loss gains much from :math:`\nabla E` at its clean points
(:func:`rsm_sampler.losses.denoising_loss`), and needs it once for each point of the bank, not at
every step. Energies that autograd cannot follow are probed by central differences, 2 d
evaluations a point. Errors of the differences are noise to the loss, which weighs it down by the
gradients' mean square.

Whether gradients may be used at all is seen from the virial theorem: for a law on all of space

.. math:: \mathbb E[(x_i - m_i)\, \partial_i E] = 1,

and where hard walls carry part of the law the left side comes out smaller.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked
from rsm_sampler.target.energy import EnergyError, MeteredEnergy

__all__ = [
    "GradientMethod",
    "autograd_gradient",
    "autograd_value_and_gradient",
    "difference_curvature",
    "difference_gradient",
    "difference_hessian",
    "differentiable",
    "value_and_gradient",
    "virial_holds",
]

GradientMethod = Literal["auto", "autograd", "differences", "none"]
_PILOT, _FIRST_STEP, _STEP = 64, 1e-2, 0.1
_TOLERANCE = 0.05


@checked
def value_and_gradient(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch dim"]
) -> tuple[Tensor, Float[Tensor, "*batch dim"]]:
    """Values of a function, and the gradients of their sum, both without a graph.

    Arguments:
        function: What is differentiated; its values have no axis that x has not.
        x: Points.

    Raises:
        ValueError: If autograd cannot differentiate the function.

    Note:
        Within :func:`torch.vmap` no tensor can be told to require gradients; there
        :func:`torch.func.vjp` differentiates.

    Example:
        >>> value_and_gradient(lambda x: x.square().sum(-1), torch.tensor([[1.0, 2.0]]))
        (tensor([5.]), tensor([[2., 4.]]))
    """
    try:
        leaf = x.detach().requires_grad_()
    except RuntimeError:
        value, pull, *_ = torch.func.vjp(function, x.detach())
        (gradient,) = pull(torch.ones_like(value))
        return value.detach(), gradient.detach()
    with torch.enable_grad():
        value = function(leaf.clone())  # which the function may change in place
    if not value.requires_grad:
        raise ValueError("energy must be differentiable by autograd for this form, got no graph")
    (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach(), gradient


@checked
def autograd_gradient(
    energy: MeteredEnergy,
    transform: Callable[[Tensor], tuple[Tensor, Tensor]],
    z: Float[Tensor, "n dim"],
    *,
    purpose: str = "training",
    inside: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
    chunk: int = 4096,
) -> Float[Tensor, "n dim"]:
    """Gradients with respect to z of the energy of x, less the volume of the transform.

    Arguments:
        energy: The energy in the coordinates x; two evaluations a point.
        transform: From z to x and the log-determinants.
        z: Points.
        purpose: The energy's account.
        inside: How points x come into the precision that the energy sees.
        chunk: Points at a time.

    Raises:
        EnergyError: If autograd cannot differentiate the energy.
    """
    return autograd_value_and_gradient(
        energy, transform, z, purpose=purpose, inside=inside, chunk=chunk
    )[1]


@checked
def autograd_value_and_gradient(
    energy: MeteredEnergy,
    transform: Callable[[Tensor], tuple[Tensor, Tensor]],
    z: Float[Tensor, "n dim"],
    *,
    context: Float[Tensor, "n context_dim"] | None = None,
    purpose: str = "training",
    inside: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
    chunk: int = 4096,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n dim"]]:
    """Energies of x less the volume of the transform, and their gradients with respect to z.

    Arguments:
        energy: The energy in the coordinates x; two evaluations a point.
        transform: From z to x and the log-determinants.
        z: Points.
        context: Contexts of the points, if the energy takes one.
        purpose: The energy's account.
        inside: How points x come into the precision that the energy sees.
        chunk: Points at a time.

    Raises:
        EnergyError: If autograd cannot differentiate the energy.
    """
    values, pieces = [], []
    for i in range(0, len(z), chunk):
        piece = z[i : i + chunk]
        given = None if context is None else context[i : i + chunk]
        with torch.enable_grad():
            leaf = piece.detach().clone().requires_grad_()
            x, log_det = transform(leaf)
            x_in = inside(x.detach(), energy.dtype)
            value, slope = energy.value_and_gradient(x_in, given, purpose=purpose)
            pulled = (x * slope.to(x)).sum() - log_det.sum()
            pieces.append(torch.autograd.grad(pulled, leaf)[0])
            values.append(value.to(z) - log_det.detach())
    return torch.cat(values), torch.cat(pieces)


@checked
def difference_gradient(
    value: Callable[[Tensor], Tensor],
    z: Float[Tensor, "n dim"],
    *,
    step: Float[Tensor, " dim"] | None = None,
    chunk: int = 65_536,
) -> Float[Tensor, "n dim"]:
    r"""Gradients from central differences of energy values, 2 d of them for each point.

    Unless they are given, steps are a tenth of :math:`(\mathbb E\, g_i^2)^{-1/2}`, the length over
    which the energy changes by about one; it is measured on 64 of the points.

    Arguments:
        value: Energies (n) of points (n, dim); infinite ones give a gradient of NaN.
        z: Points, about a unit wide if no steps are given.
        step: The step in every coordinate.
        chunk: Evaluations at a time.
    """
    if step is not None:
        return _differences(value, z, step, chunk)
    step = torch.full_like(z[0], _FIRST_STEP)
    pilot = _differences(value, z[:: max(1, len(z) // _PILOT)][:_PILOT], step, chunk)
    square = pilot.square().nanmean(0).nan_to_num(1.0)
    step = torch.where(square > 1, _STEP * square.rsqrt(), torch.full_like(square, _STEP))
    return _differences(value, z, step, chunk)


@checked
def difference_curvature(
    value: Callable[[Tensor], Tensor],
    z: Float[Tensor, "n dim"],
    *,
    step: Float[Tensor, " dim"],
    chunk: int = 65_536,
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
    """Gradients and second derivatives along the coordinates, from the same differences.

    One evaluation more for each point than :func:`difference_gradient`.

    Arguments:
        value: Energies (n) of points (n, dim); beside infinite ones gradients are NaN, and
            curvatures are not finite.
        z: Points.
        step: The step in every coordinate.
        chunk: Evaluations at a time.
    """
    ends = _around(value, z, step, chunk)
    centre = torch.cat([value(piece).to(z) for piece in z.split(chunk)])
    up, down = ends.unbind(1)
    curvature = (up - 2 * centre[:, None] + down) / step.square()
    return _slopes(ends, step), curvature


@checked
def difference_hessian(
    value: Callable[[Tensor], Tensor],
    z: Float[Tensor, "n dim"],
    *,
    step: Float[Tensor, "n dim"],
    chunk: int = 65_536,
) -> Float[Tensor, "n dim dim"]:
    r"""Second derivatives from differences of energy values, d (d + 1) + 1 of them for each point.

    .. math:: 2 h_i h_j\, \partial_{ij} E \approx E_{+i+j} + E_{-i-j}
        - E_{+i} - E_{-i} - E_{+j} - E_{-j} + 2 E

    The error is of second order, unlike that of :math:`E_{+i+j} - E_{+i} - E_{+j} + E`.

    Arguments:
        value: Energies (n) of points (n, dim).
        z: Points.
        step: The steps :math:`h_i` of every point.
        chunk: Evaluations at a time.
    """
    dim = z.shape[-1]
    first, second = torch.triu_indices(dim, dim, 1, device=z.device)
    found = []
    for point, h in zip(z, step, strict=True):
        axes = h.diag()
        centre = value(point[None]).to(z)
        single = value(torch.cat([point + axes, point - axes])).to(z).view(2, dim).sum(0)
        pieces = [single[:0]]
        for at in range(0, len(first), chunk // 2):
            offset = axes[first[at : at + chunk // 2]] + axes[second[at : at + chunk // 2]]
            ends = value(torch.cat([point + offset, point - offset])).to(z)
            pieces.append(ends.view(2, -1).sum(0))
        both = torch.cat(pieces)
        hessian = (single - 2 * centre).diag()
        hessian[first, second] = 0.5 * (both - single[first] - single[second] + 2 * centre)
        hessian[second, first] = hessian[first, second]
        found.append(hessian / (h[:, None] * h))
    return torch.stack(found)


def _differences(value: Callable[[Tensor], Tensor], z: Tensor, step: Tensor, chunk: int) -> Tensor:
    return _slopes(_around(value, z, step, chunk), step)


def _around(value: Callable[[Tensor], Tensor], z: Tensor, step: Tensor, chunk: int) -> Tensor:
    """Values a step ahead and behind in each coordinate, (n, 2, dim)."""
    dim = z.shape[-1]
    offsets = torch.cat([step.diag(), -step.diag()])
    pieces = [
        value((piece.unsqueeze(1) + offsets).reshape(-1, dim)).to(z).view(len(piece), 2, dim)
        for piece in z.split(max(1, chunk // (2 * dim)))
    ]
    return torch.cat(pieces)


def _slopes(ends: Tensor, step: Tensor) -> Tensor:
    up, down = ends.unbind(1)
    slope = (up - down) / (2 * step)
    return torch.where(slope.isfinite().all(-1, keepdim=True), slope, torch.nan)


@checked
def virial_holds(
    z: Float[Tensor, "n dim"], gradient: Float[Tensor, "n dim"], weight: Float[Tensor, " n"]
) -> bool:
    """Whether the gradients are those of a law without walls, as far as its points can tell.

    Arguments:
        z: Points.
        gradient: Gradients of the energy there; rows of NaN do not count.
        weight: Weights of the points.
    """
    known = ~gradient.isnan().any(-1)
    if int(known.sum()) < 2 * _PILOT:
        return False
    z, gradient, weight = z[known], gradient[known], weight[known] / weight[known].sum()
    centred = z - weight @ z
    virial = (centred * gradient).mean(-1)
    mean = weight @ virial
    se = (weight.square() @ (virial - mean).square()).sqrt()
    # Points of chains are dependent: their error may be several times this one.
    return bool((mean - 1).abs() <= _TOLERANCE + 10 * se)


@checked
def differentiable(energy: MeteredEnergy, x: Float[Tensor, "n dim"], purpose: str) -> bool:
    """Whether autograd gives gradients of the energy, tried on two points."""
    try:
        energy.value_and_gradient(x[:2], purpose=purpose)
    except (EnergyError, RuntimeError, TypeError, ValueError):
        return False
    return True
