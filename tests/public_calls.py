"""Every public call of the three packages, with valid arguments made from its signature.

A call is a function, a constructor or a public method of a class that stands in some module's
``__all__``. Arguments without a default get a value by their name or their annotation; what that
cannot tell stands in ``ARGUMENTS``, and objects whose methods are called stand in ``OBJECTS``.
"""

import collections.abc
import enum
import functools
import importlib
import inspect
import os
import pkgutil
import tempfile
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import matplotlib.figure
import numpy as np
import torch
from torch import Tensor

import energies
import rl
import rsm_sampler
from energies import GaussianMixture
from rsm_sampler import plotting
from rsm_sampler.baselines.annealed_langevin import ChainSampler, langevin
from rsm_sampler.baselines.denoising_energy_matching import IDEMConfig
from rsm_sampler.baselines.flow_bootstrap import FABConfig, FlowSampler, fab
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.energy_sampler import WeightedDraws
from rsm_sampler.estimators import PosteriorEstimate
from rsm_sampler.flows import DDIM
from rsm_sampler.kernels import ReverseKernel
from rsm_sampler.networks import MLP
from rsm_sampler.proposals import GaussianProposal
from rsm_sampler.samplers import Sampler
from rsm_sampler.schedules import EDM, Geometric, Linear, Schedule
from rsm_sampler.target.coordinates import Affine, Bounds
from rsm_sampler.target.energy import MeteredEnergy
from tests.exact_sampler import exact_sampler
from tests.toy_envs import SHORT, Counter

PACKAGES = (rsm_sampler, energies, rl)

# What is no call of a user, by the start of its qualified name, with the reason.
EXEMPT: dict[str, str] = {
    **dict.fromkeys(("rsm_sampler.cli.", "rl.cli."), "read by tyro from a shell; see test_cli.py"),
    **dict.fromkeys(
        (
            "rsm_sampler.bank.",
            "rsm_sampler.montecarlo.mixtures.",
            "rsm_sampler.montecarlo.descents.",
            "rsm_sampler.target.problem.",
            "rsm_sampler.target.calls.",
            "rsm_sampler.target.batches.",
            "rl.base.check_sizes",
            "rsm_sampler.exploration.Basin.",
            "rsm_sampler.exploration.Exploration.",
            "rsm_sampler.schema.",
            "energies.workers.",
            "rsm_sampler.montecarlo.population.",
            "rsm_sampler.montecarlo.densities.",
            "rsm_sampler.montecarlo.weights.",
            "rsm_sampler.target.contexts.",
            "rsm_sampler.distributed.",
            "rsm_sampler.verdict.",
        ),
        "called by the trainer and the sampler with what they have made themselves",
    ),
    **dict.fromkeys(
        (
            "rl.off_policy.",
            "rl.lockstep.",
            "rl.graphs.",
            "rl.run.",
            "rl.diffusion_agent.DiffusionAgent.",
            "rl.dacer.DACER.",
            "rl.dipo.DIPO.",
            "rl.dipo.SecondActions.",
            "rl.dipo.ascend",
            "rl.dppo.DPPO.learn",
            "rl.dpmd.DPMD.",
            "rl.dppo.DPPO.",
            "rl.qsm.QSM.",
            "rl.qvpo.QVPO.",
            "rl.sdac.SDAC.",
        ),
        "called by the training loop; users call rl.train and BaseAgent's methods",
    ),
    **dict.fromkeys(
        (
            "rl.base.BaseAgent.observe",
            "rl.base.BaseAgent.adam",
            "rl.base.BaseAgent.load_extra_state",
            "rl.base.BaseAgent.load_state",
            "rl.base.BaseAgent.from_state",
            "rl.base.BaseAgent.state",
            "rl.base.set_lr",
            "rl.replay.ReplayBuffer.add",
            "rl.replay.MultiStep.add",
            "rl.environments.Environments.restore",
            "rl.replay.MultiStep.load_state",
            "rl.config.AgentConfig.from_saved",
            "rl.stable_baselines.StableBaselinesAgent.from_state",
            "rl.stable_baselines.StableBaselinesAgent.__init__",
            "rl.stable_baselines.configuration",
            "rl.evaluation.check_fits",
            "rl.evaluation.checked_observation",
            "rl.mixtures.GaussianMixtures.",
            "rl.environments.Environments.step",
            "rl.replay.ReplayBuffer.load",
            "rl.replay.ReplayBuffer.at",
            "rl.entropy.missing_entropy",
            "rl.entropy.PolicyEntropy.",
            "rsm_sampler.ensemble.EnsembleMLP.first",
            "rsm_sampler.ensemble.EnsembleMLP.rest",
            "rl.critics.frozen",
            "rl.policies.PolicyNetwork.",
        ),
        "a step of the training loop, or a state that a checkpoint holds",
    ),
    **dict.fromkeys(
        (
            *(
                f"rsm_sampler.montecarlo.markov.{step}"
                for step in (
                    "Kernel.start",
                    "Kernel.adapt",
                    "Kernel.target_acceptance",
                    "HMC.step",
                    "HMC.trajectory",
                    "HMC.target_acceptance",
                    "MALA.target_acceptance",
                    "RandomWalk.step",
                    "RandomWalk.target_acceptance",
                    "Langevin.step",
                )
            ),
            "rsm_sampler.montecarlo.markov.GaussianPath.",
            "rsm_sampler.montecarlo.markov.ChainState.",
            "rsm_sampler.montecarlo.tempering.LadderStatistics.",
            *(
                f"rsm_sampler.montecarlo.tempering.ParallelTempering.{step}"
                for step in ("adapt", "adapt_ladder", "excess", "path", "start", "step", "works")
            ),
        ),
        "a step of chains that run_mcmc makes",
    ),
    "rsm_sampler.validation.": "the checks themselves; see test_validation.py",
    "rsm_sampler.checked.": "the checks themselves; see test_validation.py",
    "rsm_sampler.target.coordinates.coordinates_of": "a state that a checkpoint holds",
    "rsm_sampler.target.energy.MeteredEnergy.check": "called by the search",
    "rsm_sampler.target.energy.particles_of": "reads an attribute, whatever the energy is",
    "energies.particles.ParticleTarget.pair_energy": "what a subclass brings",
    "rsm_sampler.loggers.TensorBoardLogger.": "needs an extra; see JSONLinesLogger",
    "rl.stable_baselines.train": "called by rl.train, which has read the agent's name",
    "energies.probabilistic.NumPyroEnergy.__init__": "made by from_numpyro",
    "rl.stable_baselines.StableBaselinesAgent.": "needs a trained agent of stable-baselines3",
    **dict.fromkeys(
        (
            "rsm_sampler.energy_sampler.EnergySampler.__init__",
            "rsm_sampler.energy_sampler.EnergySampler.from_state",
            "rsm_sampler.energy_sampler.WeightedDraws.__init__",
            "rsm_sampler.baselines.denoising_energy_matching.IDEMSampler.",
            "rsm_sampler.baselines.annealed_langevin.ChainSampler.__init__",
            "rsm_sampler.baselines.flow_bootstrap.FlowSampler.__init__",
            "rsm_sampler.baselines.flow_bootstrap.AnnealedDraws",
            "rsm_sampler.baselines.flow_bootstrap.annealed_draws",
            "rsm_sampler.trainer.EnergyDiffusionTrainer.load_state",
            "rsm_sampler.trainer.Progress",
            "rsm_sampler.trainer_config.Sizes",
            "rsm_sampler.estimators.PosteriorEstimate",
            "rsm_sampler.estimators.ScoreEstimate",
            "rsm_sampler.kernels.ReverseDraws",
            "rsm_sampler.montecarlo.run.RefineResult",
            "rsm_sampler.montecarlo.run.MCMCResult",
            "rsm_sampler.verdict.diagnosis.Diagnosis",
            "rsm_sampler.denoisers.Denoiser.build",
            "rl.comparison.Comparison.__init__",
            "rsm_sampler.networks.MLP.standardise_context",
            "rl.comparison.Curve",
            "rl.environments.Transition",
            "rl.evaluation.Evaluation",
            "rl.grid.Cost",
            "rl.statistics.Estimate",
        ),
        "a result that the library makes",
    ),
}


@dataclass(frozen=True)
class Call:
    """One public call: how to make it, and what its arguments are."""

    name: str
    function: Any  # as it stands in the class or module
    owner: Any  # the class of a method or constructor, None for a function
    kind: Literal["function", "constructor", "method", "class"]

    @functools.cached_property
    def parameters(self):
        found = inspect.signature(self.function).parameters.values()
        skip = 0 if self.kind == "function" else 1
        return [p for p in list(found)[skip:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    @functools.cached_property
    def hints(self):
        return hints_of(self.function)

    def make(self):
        """The callable and its valid arguments, all fresh."""
        given = ARGUMENTS.get(self.name, {})
        arguments = {
            name: value() if inspect.isfunction(value) or isinstance(value, PARTIAL) else value
            for name, value in given.items()
        }
        for p in self.parameters:
            if p.default is p.empty and p.name not in arguments:
                arguments[p.name] = value_of(self, p.name, self.hints.get(p.name))
        if self.kind == "function":
            return self.function, arguments
        if self.kind == "constructor":
            return self.owner, arguments
        if self.kind == "class":
            return getattr(self.owner, self.function.__name__), arguments
        return getattr(instance(self.owner), self.function.__name__), arguments


def hints_of(function):
    try:
        return typing.get_type_hints(
            function, localns={"matplotlib": matplotlib}, include_extras=True
        )
    except NameError:
        return {}


def modules():
    for package in PACKAGES:
        yield package
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def public_calls():
    """All public calls, exempt ones included."""
    seen, found = set(), []
    for module in modules():
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            home = getattr(thing, "__module__", "") or ""
            if not callable(thing) or id(thing) in seen:
                continue
            if home.split(".")[0] not in {package.__name__ for package in PACKAGES}:
                continue
            seen.add(id(thing))
            found += list(calls_of(thing, f"{home}.{name}"))
    return sorted(found, key=lambda call: call.name)


def calls_of(thing, name):
    if not inspect.isclass(thing):
        if inspect.isfunction(thing):
            yield Call(name, thing, None, "function")
        return
    if issubclass(thing, Exception | enum.Enum) or getattr(thing, "_is_protocol", False):
        return
    if "__init__" in vars(thing) and not inspect.isabstract(thing):
        yield Call(f"{name}.__init__", vars(thing)["__init__"], thing, "constructor")
    for key, member in vars(thing).items():
        if key.startswith("_") and key != "__call__":
            continue
        if isinstance(member, classmethod | staticmethod):
            inner = member.__func__
            kind = "class" if isinstance(member, classmethod) else "function"
            yield Call(f"{name}.{key}", inner, thing, kind)
        elif inspect.isfunction(member) and not getattr(member, "__isabstractmethod__", False):
            yield Call(f"{name}.{key}", member, thing, "method")


def exempt(call):
    """The reason why a call is not tried, or None."""
    if not call.parameters:
        return "takes no argument"
    return next((why for start, why in EXEMPT.items() if call.name.startswith(start)), None)


# ------------------------------------------------------------------------ valid arguments


def quadratic(x, *context):
    return x.square().sum(-1) / 2


def denoiser(x_t, sigma, context=None):
    column = torch.as_tensor(sigma, dtype=x_t.dtype)
    column = column.unsqueeze(-1) if column.dim() else column
    return x_t / (1 + column**2)


def folder():
    return Path(tempfile.mkdtemp(dir=os.environ["FUZZ_FOLDER"]))


@functools.cache
def mixture():
    return GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 1.0)


@functools.cache
def sampler():
    return exact_sampler(mixture(), num_steps=4)


PARTIAL = (functools.partial, functools._lru_cache_wrapper)
SIZES = {
    "n": 4, "m": 5, "dim": 2, "context_dim": 1, "draws": 3, "points": 6, "chains": 4,
    "levels": 3, "modes": 2, "cells": 4, "size": 4, "steps": 3, "envs": 2, "obs": 2, "act": 1,
    "observation_dim": 2, "action_dim": 1, "members": 2, "candidates": 3, "k": 2, "nx": 3, "ny": 3,
    "b": 2, "d": 2, "pairs": 3, "width": 8, "reduced": 2, "regions": 2, "grid": 2,
}  # fmt: skip

# Values by the name of the argument, whatever the call.
NAMED: dict[str, Any] = {
    "energy": lambda: quadratic,
    "denoiser": lambda: denoiser,
    "model": lambda: denoiser,
    "kernel": lambda: ReverseKernel(),
    "proposal": lambda: GaussianProposal(torch.zeros(2), 1.0),
    "schedule": lambda: Linear(10),
    "sigma": lambda: 1.0,
    "sigma_t": lambda: 1.0,
    "sigma_s": lambda: 0.5,
    "sigmas": lambda: torch.tensor([1.0, 0.5, 0.0]),
    "low": lambda: -3.0,
    "high": lambda: 3.0,
    "scale": lambda: 1.0,
    "path": lambda: folder() / "file",
    "folder": lambda: folder(),
    "num_steps": lambda: 10,
    "sampler": sampler,
    "affine": lambda: Affine.identity(2),
    "coordinates": lambda: Bounds(-np.inf, np.inf, 2),
    "metered": lambda: MeteredEnergy(quadratic, 2),
    "scale_tril": lambda: torch.eye(2),
    "env": lambda: Counter(),
    "source": lambda: Counter(),
    "num_draws": lambda: 4,
    "evaluations": lambda: 400,
    "target": mixture,
    "base": mixture,
}

# What takes longer than a test may, or needs what only that makes: only refusals are tried.
COSTLY = {"rl.grid.compare", "rl.comparison.read"}

# Arguments of single calls, by its name: a dictionary, or a function that makes one.
ARGUMENTS: dict[str, Any] = {}


def small_training(agent="sdac"):
    """Arguments of a training of forty steps."""
    found = {
        "env": lambda: Counter(), "total_steps": 40, "progress": False, "eval_episodes": 1,
        "eval_every": 40, "width": 8, "depth": 1, "num_envs": 1, "device": "cpu",
    }  # fmt: skip
    if agent == "dppo":
        return {**found, "batch_size": 4, "rollout_steps": 8, "epochs": 1}
    found |= {"warmup_steps": 4, "batch_size": 4, "replay_size": 100}
    return found if agent == "dipo" else {**found, "policy_states": 4}


def arguments_of(call, /, **values):
    """Give one call its arguments; functions are called for a fresh value each time."""
    ARGUMENTS[call] = values


def of(function):
    """A function as an argument, not as the maker of one."""
    return lambda: function


points = functools.partial(torch.linspace, -1.0, 1.0, 4)
levels = functools.partial(torch.tensor, [1.0, 0.5, 0.0])


def shares(*shape):
    return torch.full(shape, 1.0 / shape[-1])


def normal_law():
    return torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))


def probabilistic_model():
    import numpyro
    import numpyro.distributions as law

    numpyro.sample("x", law.Normal(0.0, 1.0))


@functools.cache
def conditional():
    return energies.ConditionalMixture.line()


arguments_of("energies.adapters.DistributionTarget.__init__", distribution=normal_law)
arguments_of("energies.adapters.from_distribution", distribution=normal_law)
arguments_of(
    "energies.adapters.NumpyEnergy.__init__", fn=of(lambda x: (np.asarray(x) ** 2).sum(-1))
)
arguments_of(
    "energies.conditional.ConditionalMixture.__init__",
    prior=mixture, matrix=lambda: torch.ones(1, 2), noise_std=0.5,
)  # fmt: skip
for method in ("__call__", "log_prob", "score", "denoiser"):
    arguments_of(
        f"energies.conditional.ConditionalMixture.{method}",
        x=lambda: torch.zeros(4, 2), context=lambda: torch.zeros(4, 1),
    )  # fmt: skip
arguments_of("energies.decay.decay_energy", theta=lambda: np.array([0.5, 1.0]))
arguments_of("energies.hare_lynx.hare_lynx_energy", theta=lambda: np.zeros((2, 8)))
arguments_of("energies.gaussian_mixture.GaussianMixture.__init__", scale=1.0)
arguments_of(
    "energies.gaussian_mixture.GaussianMixture.cell_masses",
    edges_x=points, edges_y=points,
)  # fmt: skip
for target in ("Target", "AffineTarget"):
    arguments_of(f"energies.target.{target}.cell_masses", edges_x=points, edges_y=points)
arguments_of(
    "energies.logistic.LogisticRegression.__init__",
    features=lambda: torch.randn(4, 2), labels=lambda: torch.tensor([0.0, 1.0, 0.0, 1.0]),
)  # fmt: skip
arguments_of("energies.logistic.LogisticRegression.energy", x=lambda: torch.zeros(4, 3))
arguments_of("energies.logistic.LogisticRegression.reference", chains=2, burn_in=2, thinning=1)
arguments_of("energies.particles.ParticleTarget.reference", chains=2, burn_in=2, thinning=1)
for method in ("energy", "distances", "virial"):
    arguments_of(
        f"energies.particles.ParticleTarget.{method}",
        x=lambda: torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),
    )
arguments_of("energies.probabilistic.from_numpyro", model=of(probabilistic_model))
for method in ("__call__", "constrain"):
    arguments_of(f"energies.probabilistic.NumPyroEnergy.{method}", x=lambda: torch.zeros(4, 1))
arguments_of(
    "energies.quadrature.GridRejection.__init__",
    low=lambda: [-3.0, -3.0], high=lambda: [3.0, 3.0], cells=16,
)  # fmt: skip
arguments_of(
    "energies.quadrature.GridRejection.__call__",
    n=4, generator=lambda: torch.Generator().manual_seed(0), device=lambda: torch.device("cpu"),
)  # fmt: skip
arguments_of("energies.quadrature.InverseCDF.__init__", log_density=of(lambda x: -x.square() / 2))
arguments_of("energies.quadrature.InverseCDF.__call__", u=lambda: torch.rand(4))
arguments_of("energies.quadrature.InverseCDF.cdf", x=lambda: torch.rand(4))
arguments_of(
    "energies.quadrature.integrate_cells",
    density=of(lambda x: torch.exp(-x.square().sum(-1))), edges=lambda: [points()],
    resolution=lambda: [0.5],
)  # fmt: skip
arguments_of("energies.registry.get", name="rings")
arguments_of("energies.chains.long_chains", n=4, burn_in=2, thinning=1, step_size=0.1)
arguments_of("rl.base.BaseAgent.act", observation=lambda: np.zeros((1, 2), np.float32))
arguments_of("rl.base.BaseAgent.predict", observation=lambda: np.zeros(2))
arguments_of("rl.critics.best_candidate", critic=lambda: rl.critics.Critic(2, 1, width=8, depth=1))
arguments_of("rl.dppo.clip_range", config=lambda: rl.DPPOConfig())
arguments_of("rl.dppo.advantages", discount=0.9, gae=0.9)
arguments_of("rl.evaluation.evaluate", agent=lambda: agent(), episodes=1)
arguments_of("rl.grid.estimate_cost", agent="sdac", env=SHORT, updates=1)
arguments_of(
    "rl.grid.compare",
    envs=lambda: [SHORT], agents=lambda: ["sdac"], total_steps=3, out=lambda: folder(), seeds=1,
)  # fmt: skip
arguments_of("rl.comparison.Comparison.scores", agent="sdac")
arguments_of(
    "rl.comparison.write_report",
    found=lambda: comparison(), out=lambda: folder(),
)  # fmt: skip
arguments_of("rl.config.AgentConfig.preset", name="corrected")
arguments_of("rl.policies.DiffusionPolicy.walk", noise=lambda: torch.zeros(11, 4, 1))
arguments_of("rl.policies.DiffusionPolicy.flow", starts=lambda: torch.zeros(5, 1))
scores = functools.partial(dict, task=[0.5, 0.7, 0.9])
for statistic in ("interquartile_mean", "mean_of_tasks", "normalised", "performance_profile",
                  "probability_of_improvement"):  # fmt: skip
    arguments_of(f"rl.statistics.{statistic}", scores=lambda: scores())
ARGUMENTS["rl.statistics.normalised"].update(low=lambda: {"task": 0.0}, high=lambda: {"task": 1.0})
ARGUMENTS["rl.statistics.performance_profile"].update(thresholds=lambda: np.array([0.1, 0.6]))
ARGUMENTS["rl.statistics.probability_of_improvement"].update(others=lambda: scores())
arguments_of(
    "rl.statistics.stratified_bootstrap",
    statistic=of(lambda *found: 0.5), draws=4,
)  # fmt: skip
for agent_name in ("dacer", "dipo", "dpmd", "dppo", "qsm", "qvpo", "sdac"):
    arguments_of(
        f"rl.train_{agent_name}",
        **small_training(agent_name),
    )  # fmt: skip
arguments_of("rl.training.load", path=lambda: saved("agent"))
arguments_of(
    "rl.training.resume",
    run_dir=lambda: saved("run"),
    env=of(Counter),
    total_steps=41,
    progress=False,
)
for function in ("train", "train_seeds"):
    arguments_of(f"rl.training.{function}", agent="sdac", **small_training())
ARGUMENTS["rl.training.train_seeds"].update(env=of(Counter), seeds=2)
arguments_of(
    "rsm_sampler.annealing.annealed_estimate",
    x_t=lambda: torch.zeros(4, 2), sigma=lambda: torch.ones(4), stages=2,
)  # fmt: skip
arguments_of("rsm_sampler.baselines.annealed_langevin.langevin", num_steps=10)
arguments_of(
    "rsm_sampler.baselines.denoising_diffusion.ddpm",
    samples=lambda: torch.randn(64, 2), evaluations=None, config=lambda: small_config(),
    progress=False,
)  # fmt: skip
arguments_of(
    "rsm_sampler.baselines.denoising_energy_matching.idem",
    evaluations=200, config=lambda: small_idem(), progress=False,
)  # fmt: skip
arguments_of(
    "rsm_sampler.baselines.flow_bootstrap.fab",
    evaluations=2000, config=lambda: small_fab(), progress=False,
)  # fmt: skip
for method in ("forward", "noise", "score"):
    arguments_of(f"rsm_sampler.denoisers.Denoiser.{method}", x_t=lambda: torch.zeros(4, 2))
arguments_of("rsm_sampler.energy_sampler.EnergySampler.load", path=lambda: saved("sampler"))
arguments_of("rsm_sampler.energy_sampler.EnergySampler.refine", steps=2)
arguments_of("rsm_sampler.energy_sampler.EnergySampler.diagnose", n=100, witness_evaluations=2000)
arguments_of(
    "rsm_sampler.verdict.diagnosis.diagnose",
    n=100, energy=lambda: MeteredEnergy(quadratic, 2), witness_evaluations=2000,
)  # fmt: skip
arguments_of("rsm_sampler.ensemble.EnsembleMLP.__init__", inputs=lambda: [2, 1])
arguments_of(
    "rsm_sampler.equivariant.EGNN.forward",
    x=lambda: torch.zeros(4, 6), log_sigma=lambda: torch.zeros(4),
)  # fmt: skip
arguments_of("rsm_sampler.loggers.JSONLinesLogger.read", path=lambda: saved("log"))
arguments_of(
    "rsm_sampler.losses.estimate_loss",
    estimate=lambda: PosteriorEstimate(torch.zeros(4, 2), torch.ones(4), torch.zeros(4)),
)
arguments_of(
    "rsm_sampler.metrics.grid_total_variation",
    samples=lambda: torch.zeros(4, 1), cell_masses=lambda: shares(3), edges=lambda: [points()],
)  # fmt: skip
arguments_of("rsm_sampler.metrics.mode_weights", responsibilities=lambda: shares(4, 2))
arguments_of(
    "rsm_sampler.metrics.mode_weight_total_variation",
    responsibilities=lambda: shares(4, 2), weights=lambda: shares(2),
)  # fmt: skip
arguments_of("rsm_sampler.metrics.total_variation", p=lambda: shares(4), q=lambda: shares(4))
arguments_of("rsm_sampler.metrics.total_variation_floor", cell_masses=lambda: shares(4))
arguments_of("rsm_sampler.metrics.wasserstein2", y=lambda: torch.zeros(4, 2))
arguments_of(
    "rsm_sampler.montecarlo.tempering.ParallelTempering.__init__",
    inverse_temperatures=lambda: torch.tensor([0.0, 0.5, 1.0]),
)
arguments_of("rsm_sampler.montecarlo.run.run_mcmc", evaluations=400)
arguments_of("rsm_sampler.montecarlo.run.refine", steps=2)

extent = ([-1.0, -1.0], [1.0, 1.0])
arguments_of("rsm_sampler.plotting.plot_energy", extent=extent, resolution=8)
arguments_of("rsm_sampler.plotting.plot_panels", panels=lambda: {"a": torch.randn(9, 2)},
             extent=extent)  # fmt: skip
arguments_of("rsm_sampler.plotting.plot_training", history=lambda: [{"step": 1.0, "ess": 0.5}])
arguments_of(
    "rsm_sampler.plotting.save_figure",
    ax=lambda: plotting.new_figure()[1][0], path=lambda: folder() / "a.png",
)  # fmt: skip
for proposal in ("GaussianProposal", "PerturbedModel", "PerturbedBuffer", "MixtureProposal",
                 "UniformProposal"):  # fmt: skip
    arguments_of(f"rsm_sampler.proposals.{proposal}.draw", sigma=lambda: torch.ones(4))
arguments_of(
    "rsm_sampler.proposals.PerturbedModel.__init__",
    sample_fn=of(lambda n, generator=None: torch.zeros(n, 2)),
)
arguments_of(
    "rsm_sampler.proposals.MixtureProposal.__init__",
    weights=lambda: [0.5, 0.5],
    parts=lambda: [GaussianProposal(torch.zeros(2), 1.0), GaussianProposal(torch.ones(2), 1.0)],
)
arguments_of(
    "rsm_sampler.proposals.UniformProposal.__init__",
    low=lambda: -torch.ones(2), high=lambda: torch.ones(2),
)  # fmt: skip
arguments_of(
    "rsm_sampler.schedules.DiscreteSchedule.__init__", betas=lambda: torch.full((5,), 0.1)
)
arguments_of(
    "rsm_sampler.schedules.DiscreteSchedule.through", sigmas=lambda: torch.tensor([0.1, 1.0])
)
for schedule in ("DiscreteSchedule", "Geometric", "EDM"):
    arguments_of(
        f"rsm_sampler.schedules.{schedule}.sigma_of",
        t=lambda: torch.full((2,), 0.5, dtype=torch.float64),
    )
    arguments_of(
        f"rsm_sampler.schedules.{schedule}.time_of",
        sigma=lambda: torch.full((2,), 0.5, dtype=torch.float64),
    )
for schedule in ("EDM", "Geometric"):
    arguments_of(f"rsm_sampler.schedules.{schedule}.__init__", sigma_min=0.01, sigma_max=10.0)
arguments_of("rsm_sampler.target.coordinates.bounds_of", given=lambda: (0.0, 1.0))
arguments_of("rsm_sampler.schedules.Schedule.sigma", t=0.5)
arguments_of("rsm_sampler.schedules.Schedule.alpha_bar", t=0.5)
arguments_of("rsm_sampler.schedules.Schedule.time", sigma=0.5)
for method, argument, length in (("centred", "x", 9), ("inverse", "x", 9), ("inside", "x", 9),
                                 ("forward", "u", 6)):  # fmt: skip
    arguments_of(
        f"rsm_sampler.target.coordinates.MeanFree.{method}",
        **{argument: functools.partial(torch.zeros, 4, length)},
    )
for function in ("autograd_gradient", "autograd_value_and_gradient", "differentiable"):
    arguments_of(
        f"rsm_sampler.target.gradients.{function}", energy=lambda: MeteredEnergy(quadratic, 2)
    )
for function in ("autograd_gradient", "autograd_value_and_gradient"):
    ARGUMENTS[f"rsm_sampler.target.gradients.{function}"].update(
        transform=of(lambda z: (z, torch.zeros(len(z))))
    )
arguments_of(
    "rsm_sampler.trainer.EnergyDiffusionTrainer.__init__",
    device="cpu", budget=2000, config=lambda: small_config(),
)  # fmt: skip
arguments_of("rsm_sampler.trainer.EnergyDiffusionTrainer.fit", progress=False)


def small_config():
    return rsm_sampler.TrainerConfig(
        steps_per_cycle=4, max_cycles=1, width=8, depth=1, check_draws=64, batch_size=8,
        bank_size=256,
    )  # fmt: skip


def small_idem():
    return IDEMConfig(num_draws=4, batch_size=4, inner_steps=2, refill=4, buffer_size=16,
                      num_steps=4, width=8, depth=1)  # fmt: skip


def small_fab():
    return FABConfig(batch_size=8, first_passes=1, transforms=2, width=8, depth=1)


@functools.cache
def fitted():
    trainer = rsm_sampler.EnergyDiffusionTrainer(
        quadratic, 2, device="cpu", budget=2000, config=small_config()
    )
    return trainer.fit(progress=False)


@functools.cache
def saved(what):
    """A file or folder that is to be read, written once."""
    path = folder() / what
    if what == "sampler":
        fitted().save(path)
    elif what == "agent":
        agent().save(path)
    elif what == "log":
        log = rsm_sampler.JSONLinesLogger(path)
        log.log(1, loss=1.0)
        log.close()
    else:
        rl.train("sdac", **{**small_training(), "env": Counter()}, run_dir=path)
    return path


# How to make the objects whose methods are called.
OBJECTS: dict[Any, Any] = {
    GaussianMixture: mixture,
    energies.target.Target: lambda: energies.Rings(),
    energies.particles.ParticleTarget: lambda: energies.DoubleWellCluster(),
    rsm_sampler.EnergySampler: lambda: fitted(),
    WeightedDraws: lambda: fitted().weighted_draws(16),
    EDM: lambda: EDM(0.01, 10.0),
    Geometric: lambda: Geometric(0.1, 10.0),
    Schedule: lambda: Linear(10),
    Sampler: lambda: DDIM(denoiser, torch.tensor([1.0, 0.5, 0.0]), dim=2),
    Denoiser: lambda: Denoiser(MLP(2, width=8, depth=1)),
    rl.base.BaseAgent: lambda: agent(),
    rl.comparison.Comparison: lambda: comparison(),
    energies.NumPyroEnergy: lambda: energies.from_numpyro(probabilistic_model),
    energies.Funnel: lambda: energies.Funnel(2),
    energies.ManyWell: lambda: energies.ManyWell(2),
    energies.SymmetricManyWell: lambda: energies.SymmetricManyWell(2, wells=2),
    ChainSampler: lambda: langevin(quadratic, 2, num_steps=10, seed=0),
    FlowSampler: lambda: flow(),
}


@functools.cache
def agent():
    return rl.SDAC(2, 1, small_agent(), seed=0, device="cpu")


def comparison():
    curve = rl.comparison.Curve([10], [1.0], 1.0, 1.0)
    return rl.comparison.Comparison({"sdac": {SHORT: {0: curve}}}, {SHORT: 0.0}, 10)


@functools.cache
def small_agent():
    return rl.SDACConfig(width=8, depth=1, batch_size=4, replay_size=100, warmup_steps=4,
                         num_envs=1, policy_states=4)  # fmt: skip


@functools.cache
def flow():
    return fab(quadratic, 2, evaluations=200, config=small_fab(), progress=False)


def instance(owner):
    if owner in OBJECTS:
        return OBJECTS[owner]()
    constructor = next(
        (call for call in calls_of(owner, f"{owner.__module__}.{owner.__name__}")
         if call.kind == "constructor"),
        None,
    )  # fmt: skip
    if constructor is None and inspect.isabstract(owner):
        raise LookupError(f"OBJECTS must have an entry for {owner}")
    if constructor is None:
        inherited = next(base for base in owner.__mro__ if "__init__" in vars(base))
        name = f"{owner.__module__}.{owner.__name__}.__init__"
        constructor = Call(name, vars(inherited)["__init__"], owner, "constructor")
    make, arguments = constructor.make()
    return make(**arguments)


def value_of(call, name, hint):
    """A valid value for one argument."""
    kinds = kinds_of(hint)
    if name in NAMED and not (name in {"low", "high", "scale"} and kinds == {"int"}):
        return NAMED[name]()
    if name == "dtype":
        return torch.float64
    if name in SIZES and "int" in kinds:
        return SIZES[name]
    for part in parts_of(hint):
        made = value_for(part)
        if made is not None:
            return made
    raise LookupError(f"{call.name}: no value for {name}: {hint}")


def parts_of(hint):
    if get_origin(hint) is typing.Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (typing.Union, types.UnionType):
        return [part for part in get_args(hint) if part is not type(None)]
    return [hint]


def value_for(part):
    origin = get_origin(part)
    if is_tensor(part):
        return tensor_like(part)
    if part is Tensor:
        return torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    if part is int:
        return 3
    if part is float:
        return 1.0
    if part is bool:
        return True
    if part is str:
        return "name"
    if origin is Literal:
        return get_args(part)[0]
    if part is Path:
        return folder() / "file"
    if part is torch.Generator:
        return torch.Generator().manual_seed(0)
    if origin is collections.abc.Callable or part is collections.abc.Callable:
        return quadratic
    if part is torch.device:
        return torch.device("cpu")
    if part in (dict, collections.abc.Mapping) or origin in (dict, collections.abc.Mapping):
        return {}
    if origin in (list, tuple, collections.abc.Sequence):
        inner = value_for(get_args(part)[0]) if get_args(part) else None
        return None if inner is None else [inner, inner]
    return None


def is_tensor(part):
    return hasattr(part, "dim_str") and hasattr(part, "array_type")


def tensor_like(part):
    """A tensor of the annotated shape."""
    shape: list[int] = []
    for token in part.dim_str.split():
        token = token.replace("#", "")
        if token.startswith("*") or token == "...":
            shape += [4]
        else:
            shape += [int(token) if token.isdigit() else SIZES.get(token, 2)]
    generator = torch.Generator().manual_seed(1)
    family = part.dtype.__name__ if hasattr(part.dtype, "__name__") else "Float"
    if family == "Int":
        made = torch.zeros(shape, dtype=torch.long)
    elif family == "Bool":
        made = torch.ones(shape, dtype=torch.bool)
    else:
        made = torch.randn(shape, generator=generator)
    return made.numpy() if part.array_type is np.ndarray else made


def kinds_of(hint):
    """The kinds of values that an annotation allows, as words."""
    found = set()
    for part in parts_of(hint):
        origin = get_origin(part)
        if is_tensor(part):
            found.add("tensor" if part.array_type is Tensor else "array")
        elif part is Tensor:
            found.add("tensor")
        elif part in (int, float, bool, str):
            found.add(part.__name__)
        elif origin is Literal:
            found.add("literal")
        elif part is Path or (
            inspect.isclass(origin or part) and issubclass(origin or part, os.PathLike)
        ):
            found.add("path")
        elif part is torch.Generator:
            found.add("generator")
        elif part is torch.device:
            found.add("device")
        elif part is torch.dtype:
            found.add("dtype")
        elif origin is collections.abc.Callable or part is collections.abc.Callable:
            found.add("callable")
        elif origin in (tuple, list, collections.abc.Sequence):
            found.add("sequence")
        elif origin in (dict, collections.abc.Mapping):
            found.add("mapping")
        elif part is Any or part is object or part is None or isinstance(part, typing.TypeVar):
            found.add("any")
        elif inspect.isclass(part):
            found.add("class")
        else:
            found.add("other")
    return found


def optional(hint):
    return type(None) in get_args(hint)
