"""A Gaussian mixture with every exact answer, and a guard against reading values back."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class IsotropicMixture:
    """Mixture of isotropic normal laws in double precision, at every noise scale.

    Arguments:
        means: (m, dim).
        stds: (m,) standard deviations.
        weights: (m,) probabilities, up to a factor.
        log_z: Log of the integral of exp(-energy).
    """

    def __init__(self, means, stds, weights, log_z=0.0):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        weights = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = weights / weights.sum()
        self.log_z = log_z
        self.dim = self.means.shape[-1]

    def _component_log_prob(self, x, sigma):
        """Joint log-density of point and component, (*batch, m), and variances, (*batch, m)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).unsqueeze(-1)
        variance = self.stds.to(x.device).square() + sigma.square()
        distance = (x.double().unsqueeze(-2) - self.means.to(x.device)).square().sum(-1)
        volume = self.dim / 2 * torch.log(2 * math.pi * variance)
        return self.weights.to(x.device).log() - distance / (2 * variance) - volume, variance

    def log_prob(self, x, sigma=0.0):
        """Normalised log-density of x = x_0 + sigma * noise."""
        return self._component_log_prob(x, sigma)[0].logsumexp(-1)

    def denoiser(self, x, sigma, context=None):
        """Mean of x_0 given x = x_0 + sigma * noise."""
        joint, variance = self._component_log_prob(x, sigma)
        shrink = (self.stds.to(x.device).square() / variance).unsqueeze(-1)
        means = self.means.to(x.device)
        towards = means + shrink * (x.double().unsqueeze(-2) - means)
        return (joint.softmax(-1).unsqueeze(-1) * towards).sum(-2)

    def score(self, x, sigma=0.0):
        """Gradient of log_prob."""
        joint, variance = self._component_log_prob(x, sigma)
        pull = (self.means.to(x.device) - x.double().unsqueeze(-2)) / variance.unsqueeze(-1)
        return (joint.softmax(-1).unsqueeze(-1) * pull).sum(-2)

    def energy(self, x, context=None):
        """Minus log-density, less log_z, in the precision of x."""
        return (-self.log_prob(x) - self.log_z).to(x.dtype)

    def sample(self, n, generator=None):
        """Exact draws, (n, dim)."""
        part = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, dtype=torch.float64, generator=generator)
        return self.means[part] + self.stds[part].unsqueeze(-1) * noise


def two_modes(log_z=0.0):
    """Two unequal modes in two dimensions."""
    return IsotropicMixture([[1.5, 0.5], [-1.0, -1.0]], [0.6, 0.9], [0.7, 0.3], log_z)


class NoReadBack(TorchDispatchMode):
    """Fails where a tensor's value is read, which makes the host wait for an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        for forbidden in ("_local_scalar_dense", "nonzero", "masked_select"):
            assert forbidden not in name, f"{name} reads a value back"
        return func(*args, **(kwargs or {}))
