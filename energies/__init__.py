"""Target energies with known answers, and adapters for the user's own.

A target is called like any energy, ``target(x)`` with ``x`` of shape ``(*batch, dim)``, and also
knows its normaliser, exact draws, modes and cell probabilities.

>>> import energies
>>> target = energies.get("paper-mixture")
>>> target.sample((3, 5)).shape
torch.Size([3, 5, 2])
"""

from energies.adapters import (
    DistributionTarget,
    LogProbEnergy,
    NumpyEnergy,
    from_distribution,
    from_log_prob,
    from_numpy,
)
from energies.conditional import ConditionalMixture
from energies.decay import DecayPosterior, decay_energy
from energies.funnel import Funnel
from energies.gaussian_mixture import GaussianMixture
from energies.hare_lynx import hare_lynx_energy
from energies.logistic import LogisticRegression
from energies.many_well import ManyWell, SymmetricManyWell
from energies.particles import DoubleWellCluster, LennardJones, ParticleTarget
from energies.probabilistic import NumPyroEnergy, from_numpyro
from energies.registry import get, names
from energies.rings import Rings
from energies.student_t import StudentT
from energies.target import AffineTarget, Target
from energies.two_moons import TwoMoons

__all__ = [
    "AffineTarget",
    "ConditionalMixture",
    "DecayPosterior",
    "DistributionTarget",
    "DoubleWellCluster",
    "Funnel",
    "GaussianMixture",
    "LennardJones",
    "LogProbEnergy",
    "LogisticRegression",
    "ManyWell",
    "NumPyroEnergy",
    "NumpyEnergy",
    "ParticleTarget",
    "Rings",
    "StudentT",
    "SymmetricManyWell",
    "Target",
    "TwoMoons",
    "decay_energy",
    "from_distribution",
    "from_log_prob",
    "from_numpy",
    "from_numpyro",
    "get",
    "hare_lynx_energy",
    "names",
]
