r"""Hares and lynxes: eight parameters of a simulator, from real data, without gradients.

The pelts that the Hudson's Bay Company bought from 1900 to 1920 follow, it is said, Lotka and
Volterra's equations for prey u and predator v,

.. math::
    \dot u = (\alpha - \beta v)\, u, \qquad \dot v = (-\gamma + \delta u)\, v,

from unknown beginnings :math:`u_0, v_0`, each observed with its own logarithmic error
:math:`\sigma_u, \sigma_v`. All eight are positive; the posterior is one of their logarithms,
:math:`\theta = (\log \alpha, \log \beta, \log \gamma, \log \delta, \log u_0, \log v_0,
\log \sigma_u, \log \sigma_v)`, with the Jacobian of that change. Priors:
:math:`\alpha, \gamma \sim \mathcal N(1, 0.5^2)`,
:math:`\beta, \delta \sim \mathcal N(0.05, 0.05^2)`,
:math:`u_0, v_0 \sim \mathrm{LogNormal}(\log 10, 1)`,
:math:`\sigma_u, \sigma_v \sim \mathrm{LogNormal}(-1, 1)`.

:func:`hare_lynx_energy` is a simulator as people have them: NumPy, an integrator, no gradient.

References:
    | Predator-prey population dynamics: the Lotka-Volterra model in Stan (Carpenter, 2018)
    | https://mc-stan.org/users/documentation/case-studies/lotka-volterra-predator-prey.html
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rsm_sampler.checked import checked

__all__ = ["hare_lynx_energy"]

_Array = npt.NDArray[np.float64]

# Thousands of pelts, every year from 1900 on (Hewitt, 1921).
HARES = np.array(
    [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1,
     40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
)  # fmt: skip
LYNXES = np.array(
    [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4,
     8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
)  # fmt: skip
_STEPS = 20  # of the integrator in a year


@checked
def hare_lynx_energy(theta: npt.ArrayLike) -> _Array:
    r"""Minus the log of likelihood times priors, for many parameter vectors at once.

    The equations are integrated for the logarithms of both populations, by the classical
    Runge-Kutta method with twenty steps in a year (an error of the energy of about 1e-4 in the
    bulk of the posterior).

    Arguments:
        theta: Logarithms of the eight parameters, with shape (n, 8).

    Returns:
        The energies, with shape (n), plus infinity where the populations explode.

    Example:
        >>> stan = np.log([[0.55, 0.028, 0.80, 0.024, 33.9, 5.9, 0.25, 0.25]])
        >>> bool(hare_lynx_energy(stan) < hare_lynx_energy(stan + 0.3))
        True
    """
    theta = np.asarray(theta, np.float64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        alpha, beta, gamma, delta = np.exp(theta[:, :4]).T
        populations = theta[:, 4:6].T.copy()
        error = np.exp(theta[:, 6:8]).T

        growth = np.stack([alpha, -gamma])
        coupling = np.stack([-beta, delta])  # of the other species

        def slope(logs: _Array) -> _Array:
            rate = np.exp(logs[::-1])
            rate *= coupling
            rate += growth
            return rate

        step = 1 / _STEPS
        energy = np.zeros(len(theta))
        for year, observed in enumerate(np.log(np.stack([HARES, LYNXES], 1))):
            for _ in range(_STEPS if year else 0):
                first = slope(populations)
                second = slope(populations + 0.5 * step * first)
                third = slope(populations + 0.5 * step * second)
                fourth = slope(populations + step * third)
                populations += step / 6 * (first + 2 * (second + third) + fourth)
            misfit = (observed[:, None] - populations) / error
            energy += (0.5 * misfit**2 + theta[:, 6:8].T).sum(0)
        for value, mean, std in (
            (alpha, 1.0, 0.5), (beta, 0.05, 0.05), (gamma, 1.0, 0.5), (delta, 0.05, 0.05),
        ):  # fmt: skip
            energy += 0.5 * ((value - mean) / std) ** 2
        energy -= theta[:, :4].sum(1)  # from a density of rates to one of their logarithms
        energy += 0.5 * ((theta[:, 4:6] - np.log(10.0)) ** 2).sum(1)
        energy += 0.5 * ((theta[:, 6:8] + 1.0) ** 2).sum(1)
    return np.where(np.isfinite(energy), energy, np.inf)
