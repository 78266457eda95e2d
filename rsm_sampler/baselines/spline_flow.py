r"""A neural spline flow, of the package ``zuko``: a density with draws of the same cost.

A map f from points to standard normal noise gives them the density

.. math:: \log q(z) = \log \mathcal N(f(z); 0, I) + \log |\det \partial f / \partial z| .

It is made of couplings, in which every coordinate goes through a monotonic spline; the knots for
one half of the coordinates are functions of the other half, and the halves take turns. Outside of
[-5, 5] a spline is the identity.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributions, nn

from rsm_sampler.checked import checked

__all__ = ["SplineFlow"]


@checked
class SplineFlow(nn.Module):
    """A neural spline flow with coupling layers, and with its own source of randomness.

    Arguments:
        dim: Length of a point.
        transforms: Couplings.
        bins: Bins of a spline.
        width: Units per hidden layer.
        depth: Hidden layers of a coupling.
        seed: Decides the initial weights.

    Raises:
        ImportError: Without zuko.

    References:
        | Neural spline flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032
    """

    def __init__(
        self, dim: int, *, transforms: int, bins: int, width: int, depth: int, seed: int
    ) -> None:
        super().__init__()
        self.dim = dim
        spline = _spline_flow()
        # zuko draws from the global generator, which is left as it was found.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            whole: Any = spline(
                dim,
                transforms=transforms,
                bins=bins,
                passes=2,
                hidden_features=[width] * depth,
            )
        self.transform: Any = whole.transform

    def log_prob(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Log-density.

        Arguments:
            z: Points.
        """
        noise, log_det = self.transform().call_and_ladj(z)
        return log_det - (noise.square() + math.log(2 * math.pi)).sum(-1) / 2

    @torch.no_grad()
    def draw(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        """Draws and their log-densities.

        Arguments:
            n: Number of draws.
            generator: Source of randomness.
        """
        like = next(self.parameters())
        noise = torch.randn(n, self.dim, dtype=like.dtype, device=like.device, generator=generator)
        z = self.transform().inv(noise)
        return z, self.log_prob(z)

    def log_prob_and_slope(
        self, z: Float[Tensor, "n dim"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n dim"]]:
        """Log-densities and their gradients with respect to the points, without a graph.

        Arguments:
            z: Points.
        """
        with torch.enable_grad():
            z = z.detach().clone().requires_grad_()
            log_prob = self.log_prob(z)
            (slope,) = torch.autograd.grad(log_prob.sum(), z)
        return log_prob.detach(), slope


def _spline_flow() -> Callable[..., nn.Module]:
    """The class ``zuko.flows.NSF``; importing it leaves torch.distributions as it was."""
    base = distributions.Distribution
    before = {name: base.__dict__[name] for name in ("_validate_args", "arg_constraints")}
    try:
        from zuko.flows import NSF
    except ImportError as error:
        raise ImportError(
            "fab needs zuko: pip install 'rsm-sampler[flows]'", name="zuko"
        ) from error
    finally:
        for name, value in before.items():
            setattr(base, name, value)
    return NSF
