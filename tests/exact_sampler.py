"""Samplers that are exact for one law and shown the energy of another."""

import math

import torch

from energies import GaussianMixture
from rsm_sampler.energy_sampler import EnergySampler
from rsm_sampler.schedules import EDM
from rsm_sampler.target.coordinates import Affine, Bounds
from rsm_sampler.target.energy import MeteredEnergy


class ExactDenoiser(torch.nn.Module):
    """E[z_0 | z_t] of a mixture, in the coordinates of the map x = loc + scale_tril z."""

    def __init__(self, law, affine):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        inverse = torch.linalg.inv(affine.scale_tril)
        self.law = GaussianMixture(
            (law.loc - affine.loc) @ inverse.T,
            covariance=inverse @ law.covariances @ inverse.T,
            weights=law.weights,
        )

    def forward(self, z_t, sigma, context=None):
        return self.law.denoiser(z_t, sigma)


class ConditionalDenoiser(torch.nn.Module):
    """The same for a posterior given a context, with one scale for all coordinates."""

    def __init__(self, mixture, affine, blind=False):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.mixture, self.loc = mixture, affine.loc.float()
        self.scale, self.blind = float(affine.scale_tril[0, 0]), blind

    def forward(self, z_t, sigma, context=None):
        if self.blind:
            context = torch.zeros_like(context)
        x_t = self.loc + self.scale * z_t
        return (self.mixture.denoiser(x_t, self.scale * sigma, context) - self.loc) / self.scale


def exact_sampler(target, law=None, *, around=None, seed=0, num_steps=32, budget=None):
    """A sampler of `law` (the target's if None), to be examined with the target's energy.

    Its coordinates have the mean and covariance of `around`, the law's own if None: what a search
    that saw no more than the law would have found.
    """
    law = target if law is None else law
    around = law if around is None else around
    affine = Affine(around.mean, torch.linalg.cholesky(around.covariance))
    return sampler_of(ExactDenoiser(law, affine), target, affine, seed, num_steps, budget)


def sampler_of(denoiser, energy, affine, seed=0, num_steps=32, budget=None, context_dim=None,
               draw_context=None, bounds=None):  # fmt: skip
    dim = len(affine.loc)
    return EnergySampler(
        denoiser,
        affine,
        bounds or Bounds(-math.inf, math.inf, dim),
        EDM(0.004, 20.0),
        num_steps,
        {"dim": dim, "context_dim": context_dim},
        seed,
        MeteredEnergy(energy, dim, context_dim=context_dim),
        {"budget": budget},
        draw_context=draw_context,
    )
