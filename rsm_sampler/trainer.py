r"""From an energy to a sampler: the training loop.

:meth:`EnergyDiffusionTrainer.fit` does, in this order,

1. **search** (:mod:`rsm_sampler.bank.explorer`): location, scale and a bank of weighted points;
2. **train** in cycles, each with a learning rate that falls to zero and a running mean of the
   weights. With ``loss="mirror-descent"`` a step draws clean points from the bank by their
   weights and regresses on them: loss (13), whose weights :math:`e^{-E}/\pi` are realised by
   resampling. No energy is evaluated in these steps. Where the bank comes from chains, the
   gradients of the energy at its points, by autograd or from differences of values, take most of
   the loss's variance away (:mod:`rsm_sampler.target.gradients`). With ``loss="reverse-sampling"``
   a step draws noisy points from ``proposal`` and K clean candidates for each: loss (14), K energy
   evaluations and one network call per noisy point;
3. **check** after each cycle: exact importance weights of fresh draws give the effective sample
   size. Training stops when it is high enough or, beyond sixteen dimensions, hardly grows;
   when the cycles are used up, or when the budget is;
4. **renew** a bank of chains, where the sampler has become good enough: its own draws with the
   exact weights of their paths are the next bank, a step of mirror descent from the sampler to
   the target. Chains may have the modes' weights wrong; these weights do not.

Everything that decides the result is in ``state()``: a run that is interrupted and resumed gives
the same numbers, bit for bit on the CPU with the same number of threads.
"""

import contextlib
import copy
import math
import os
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rsm_sampler import checkpoint
from rsm_sampler.bank.bank import Bank
from rsm_sampler.bank.plan import Plan
from rsm_sampler.bank.supply import Supply
from rsm_sampler.checked import checked
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.distributed import Team
from rsm_sampler.energy_sampler import (
    ARCHITECTURE,
    COORDINATES,
    COUNTS,
    EXACT_DENSITY,
    EnergySampler,
)
from rsm_sampler.estimators import TargetForm
from rsm_sampler.exploration import Exploration, exploration_of
from rsm_sampler.interrupts import deferred_interrupt, terminable
from rsm_sampler.kernels import GaussianReferenceKernel, Kernel
from rsm_sampler.loggers import Logger
from rsm_sampler.losses import denoising_loss, reverse_sampling_loss
from rsm_sampler.montecarlo.weights import LogWeights
from rsm_sampler.networks import MLP
from rsm_sampler.proposals import Proposal
from rsm_sampler.schedules import EDM
from rsm_sampler.schema import (
    GENERATOR,
    SEED,
    anything,
    entries,
    fits,
    integer,
    items,
    number,
    optimised,
    optional,
    plain,
    record,
    tensor,
    text,
    understood,
)
from rsm_sampler.target.contexts import Contexts
from rsm_sampler.target.coordinates import Affine, Bounds, Coordinates, MeanFree, bounds_of
from rsm_sampler.target.energy import BudgetExceededError, MeteredEnergy, particles_of
from rsm_sampler.target.gradients import GradientMethod
from rsm_sampler.trainer_config import TrainerConfig

__all__ = ["DivergedError", "EnergyDiffusionTrainer", "Progress"]

_KIND, _VERSION = "trainer", 5
_CHECK = record(
    {name: number(finite=False, nan=True) for name in ("step", "ess", "log_z")},
    {name: number(least=0.0) for name in ("evaluations", "seconds")},
    others=number(finite=False, nan=True),
)
_TRAINER = record(
    {
        "config": entries(plain),
        "architecture": ARCHITECTURE,
        "seed": SEED,
        "loss": text(("mirror-descent", "reverse-sampling")),
        "target": text(get_args(TargetForm)),
        "gradients": text(get_args(GradientMethod)),
        "coordinates": COORDINATES,
        "counts": COUNTS,
        "budget": optional(integer(least=1)),
        "bank": optional(entries(anything)),  # Bank.from_state and _bank_kept read it
        "denoiser": entries(tensor()),
        "average": entries(tensor()),
        "optimiser": anything,  # compared with the trainer's own
        "generator": GENERATOR,
        "history": items(_CHECK),
        "step": integer(),
        "step_in_cycle": integer(),
        "first_step": integer(),
        "cycle": integer(most=1000),
        "seconds": number(least=0.0),
    },
    {"seen": plain},
)


# Of a bank's density: that its tensors fit together its values at the bank's points show.
def _density(value: object, key: str) -> None:
    """Allow the state of a density, whose parts may be densities."""
    record(
        {},
        {
            "df": number(least=1.0, most=1e4),
            "tail": number(least=1.0, most=1e4),
            "share": number(least=0.0, most=1.0),
            "laws": items(_density),
            "counts": items(integer(least=1)),
            "broad": _density,
            "kind": tensor(None, dtypes=(torch.int64,)),
        },
        others=tensor(),
    )(value, key)


_LEAST_BUDGET = 500
_WORTH_A_CYCLE = 1.25  # growth of the share of the effective sample size
_SAVE_EVERY = 600.0  # seconds of a cycle
_POINTS_PER_LEVEL = 4  # of a batch: what depends on the noise level alone is computed once


class DivergedError(ArithmeticError):
    """The loss of a training, or an action of an agent, is no longer finite."""


@dataclass(frozen=True)
class Progress:
    """What a callback sees.

    Attributes:
        step: Optimiser steps so far.
        cycle: Index of the cycle, from 0.
        loss: Mean loss since the last call.
        ess: Share of the effective sample size at the last check; NaN before the first.
        evaluations: Energy evaluations so far.
        seconds: Time spent in ``fit``.
    """

    step: int
    cycle: int
    loss: float
    ess: float
    evaluations: int
    seconds: float


@checked(skip=("energy", "bounds"), above={"scale": 0})
class EnergyDiffusionTrainer:
    r"""Trains a diffusion model on an energy, :math:`p(x) \propto \exp(-E(x))`.

    Arguments:
        energy: The energy: points (n, dim), and contexts (n, context_dim) if there are any, to
            values (n). Only values are needed. See :mod:`energies` for adapters.
        dim: Length of a point.
        context_dim: Length of a context, for a conditional energy.
        context: Draws contexts for training, ``(n, generator) -> (n, context_dim)``.
        bounds: ``(low, high)``, numbers or one for each coordinate, infinite where there is none;
            or a list with one pair ``(low, high)`` for each coordinate. In two dimensions a list
            that can be read in both ways is refused; a tuple of two lists is ``(low, high)``. See
            :func:`~rsm_sampler.target.coordinates.bounds_of`.
        particles: ``(n, s)`` for an energy of n equal particles in s dimensions that does not
            change when they are moved, turned or mirrored together, or renumbered: the law on
            centred configurations is learned by an equivariant network, and draws are centred. By
            default the energy's own attribute ``particles``, if it has one.
        seed: Decides every random number.
        device: ``"auto"`` takes a GPU where there is one.
        budget: Most energy evaluations of ``fit``, search included; None for the config's.
        loss: ``"mirror-descent"`` (13) or ``"reverse-sampling"`` (14).
        gradients: Where the loss (13) gets gradients of the energy at the bank's points from:
            ``"autograd"``, ``"differences"`` of values, or ``"none"``. ``"auto"`` takes, beyond
            twelve dimensions and for particles, autograd where it works, else differences where
            they can be afforded. None of them for an energy with hard walls, or with contexts.
        proposal: h_t of loss (14), in standardised coordinates.
        kernel: Reverse kernel of loss (14); a Gaussian reference of the target's width if None.
        target: Target of loss (14): ``"value"``, or with an energy that autograd can
            differentiate ``"gradient"`` or ``"mixed"``.
        centre: Where to look first, one number for each coordinate, within the bounds.
        scale: Width to look at, if known to an order of magnitude, in the units of x.
        dtype: Precision in which the energy sees points and contexts: ``torch.float64``, or
            ``torch.float32`` for energies that cannot do with it, such as single-precision
            networks. Its values are kept in double precision.
        call_timeout: Seconds that one call of the energy may take; points that take longer have
            weight zero. See :class:`~rsm_sampler.target.energy.MeteredEnergy`.
        samples: Samples of the target, for denoising score matching (9) on data instead of a
            search; the energy then only serves checks and diagnosis.
        warm_start: A trained sampler whose network and coordinates are the start.
        config: Everything else.

    Raises:
        TypeError: If the energy cannot be called.
        ValueError: If an argument does not fit; the message names it.

    Example:
        >>> trainer = EnergyDiffusionTrainer(
        ...     lambda x: x.square().sum(-1) / 2, dim=1, budget=2000, seed=0,
        ...     config=TrainerConfig(steps_per_cycle=20, max_cycles=1, width=8, check_draws=64),
        ... )
        >>> sampler = trainer.fit(progress=False)
        >>> sampler.sample(5).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        energy: Callable[..., Tensor],
        dim: int,
        *,
        context_dim: int | None = None,
        context: Callable[..., Tensor] | None = None,
        bounds: Sequence[Any] | Tensor | None = None,
        particles: tuple[int, int] | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        budget: int | None = None,
        loss: Literal["mirror-descent", "reverse-sampling"] = "mirror-descent",
        gradients: GradientMethod = "auto",
        proposal: Proposal | None = None,
        kernel: Kernel | None = None,
        target: TargetForm = "value",
        centre: Sequence[float] | Tensor | None = None,
        scale: float | None = None,
        dtype: torch.dtype = torch.float64,
        call_timeout: float | None = None,
        samples: Float[Tensor, "n dim"] | None = None,
        warm_start: EnergySampler | None = None,
        config: TrainerConfig | None = None,
    ) -> None:
        if (context_dim is None) != (context is None):
            raise ValueError(
                "context must be given together with context_dim, got "
                f"context_dim={context_dim} and context={context}"
            )
        if loss not in {"mirror-descent", "reverse-sampling"}:
            raise ValueError(f"loss must be 'mirror-descent' or 'reverse-sampling', got {loss!r}")
        if gradients not in get_args(GradientMethod):
            raise ValueError(
                f"gradients must be one of {get_args(GradientMethod)}, got {gradients!r}"
            )
        if (loss == "reverse-sampling") != (proposal is not None):
            raise ValueError(
                f"proposal must be given for, and only for, loss='reverse-sampling', got "
                f"{proposal} with loss={loss!r}"
            )
        if samples is not None and context is not None:
            raise ValueError("samples must be None with contexts, got both")
        if loss == "reverse-sampling" and context is not None:
            raise ValueError("loss must be 'mirror-descent' with contexts, got 'reverse-sampling'")
        if budget is not None and budget < _LEAST_BUDGET:
            raise ValueError(f"budget must be at least {_LEAST_BUDGET} evaluations, got {budget}")
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.team = Team(device)
        self.device = self.team.device
        self.energy = MeteredEnergy(
            self.team.energy(energy, call_timeout),
            dim,
            context_dim=context_dim,
            budget=budget,
            dtype=dtype,
            call_timeout=call_timeout,
        )
        self._own_energy = energy
        self.config = config or TrainerConfig()
        self.dim, self.context_dim = dim, context_dim
        self.seed = seed
        self.contexts = (
            None if context is None else Contexts(context, context_dim or 0, self.device)
        )
        particles = particles_of(energy, particles)
        if particles is not None:
            unfit = {"bounds": bounds, "context": context, "centre": centre, "proposal": proposal}
            for name, value in unfit.items():
                if value is not None:
                    raise ValueError(f"{name} must be None for particles, got {value}")
            if particles[0] * particles[1] != dim:
                raise ValueError(f"particles must have n s equal to dim {dim}, got {particles}")
        self.sizes = self.config.sizes(dim, particles)
        self.coordinates: Coordinates = (
            bounds_of(bounds, dim) if particles is None else MeanFree(*particles)
        )
        if target not in get_args(TargetForm):
            raise ValueError(f"target must be one of {get_args(TargetForm)}, got {target!r}")
        self.loss, self.proposal, self.target = loss, proposal, target
        self.gradients = gradients
        self.kernel = kernel or GaussianReferenceKernel(
            torch.zeros(self.coordinates.reduced, dtype=torch.float32, device=self.device),
            self.config.reference_scale,
            antithetic=True,
        )
        draws = self.config.num_draws
        if loss == "reverse-sampling" and draws % 2 and getattr(self.kernel, "antithetic", False):
            raise ValueError(f"num_draws must be even for an antithetic kernel, got {draws}")
        self.centre, self.scale = self._where_to_look(centre, scale)
        self._hints: dict[str, Any] = {} if self.scale is None else {"scale": float(self.scale)}
        if centre is not None:
            self._hints["centre"] = torch.as_tensor(centre, dtype=torch.float64).tolist()
        self.samples = samples
        if samples is not None and (samples.dim() != 2 or samples.shape[-1] != dim):
            raise ValueError(f"samples must have shape (n, {dim}), got {tuple(samples.shape)}")
        if samples is not None:
            bad = ~self.coordinates.inverse(samples).isfinite().all(-1)
            if len(samples) < 2 or bool(bad.any()):
                raise ValueError(
                    "samples must be at least two finite points within the bounds, got "
                    f"{int(bad.sum())} others of {len(samples)}"
                )

        self.generator = torch.Generator(self.device).manual_seed(seed)
        weights = torch.Generator().manual_seed(seed)
        self.architecture = self._architecture(particles)
        if warm_start is not None and warm_start.architecture != self.architecture:
            raise ValueError(
                f"warm_start must have this trainer's architecture {self.architecture}, got "
                f"{warm_start.architecture}"
            )
        self.denoiser = Denoiser.build(self.architecture, weights).to(self.device)
        self.average = Denoiser.build(self.architecture, weights).to(self.device)
        self._warm = warm_start is not None
        if warm_start is not None:
            self.denoiser.load_state_dict(warm_start.denoiser.state_dict())
            if self.centre is None:
                self.centre = warm_start.affine.loc.double().cpu()
                diagonal = warm_start.affine.scale_tril.diagonal().double()
                if scale is None:
                    self.scale = float(diagonal.log().mean().exp())
        self.average.load_state_dict(self.denoiser.state_dict())
        self.average.requires_grad_(False)
        network: Any = torch.compile(self.denoiser) if self.config.compile else self.denoiser
        self._shared = self.team.denoiser(network)
        self.optimiser = torch.optim.Adam(
            self.denoiser.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.99)
        )
        self.supply = Supply(
            self.energy,
            self.coordinates,
            self.config,
            self.generator,
            contexts=self.contexts,
            gradients=gradients,
        )
        self.history: list[dict[str, float]] = []
        self.step = self.step_in_cycle = self.cycle = 0
        self._first_step = 0  # with the present bank
        self._insists = False  # on all cycles
        self.seconds = 0.0
        levels = self.config.noise_levels()
        self._levels, self._on_host = levels.to(self.device), levels.tolist()

    def _where_to_look(
        self, centre: Sequence[float] | Tensor | None, scale: float | None
    ) -> tuple[Tensor | None, float | None]:
        """The user's centre and scale, in unbounded coordinates."""
        u = torch.zeros(self.dim, dtype=torch.float64)
        if centre is not None:
            given = torch.as_tensor(centre, dtype=torch.float64)
            if given.shape != (self.dim,):
                raise ValueError(f"centre must have shape ({self.dim},), got {tuple(given.shape)}")
            u = self.coordinates.inverse(given)
            if not bool(u.isfinite().all()):
                raise ValueError(f"centre must lie within the bounds, got {given.tolist()}")
        if scale is not None and isinstance(self.coordinates, Bounds):
            _, log_det = self.coordinates.forward(u)
            scale *= math.exp(-float(log_det) / self.dim)
        return (None if centre is None else u), scale

    def _architecture(self, particles: tuple[int, int] | None) -> dict[str, Any]:
        """What describes the network: plain values."""
        config, sizes = self.config, self.sizes
        if particles is not None:
            return {
                "num_particles": particles[0],
                "space_dim": particles[1],
                "width": sizes.width,
                "depth": sizes.depth,
            }
        return {
            "dim": self.dim,
            "context_dim": self.context_dim,
            "width": sizes.width,
            "depth": sizes.depth,
            "frequencies": config.frequencies,
            "bandwidth": config.bandwidth,
            "harmonics": sizes.harmonics,
        }

    @property
    def evaluations(self) -> int:
        """Energy evaluations so far."""
        return self.energy.evaluations

    @property
    def converged(self) -> bool:
        """Whether the last check reached the wanted effective sample size.

        Beyond sixteen dimensions also whether it no longer grows.
        """
        return self._reached or self._settled

    @property
    def _reached(self) -> bool:
        share = self.config.target_ess
        if self.contexts is not None:
            share = 1 - 0.4 * (1 - share)
        return bool(self.history) and self.history[-1]["ess"] >= share

    @property
    def _settled(self) -> bool:
        # Path weights never come near to it, and a cycle takes about as long as all before it.
        ess = [record["ess"] for record in self.history]
        return self._by_paths and len(ess) > 1 and ess[-1] < _WORTH_A_CYCLE * ess[-2]

    @property
    def _by_paths(self) -> bool:
        """Whether there are too many dimensions for checks by the density."""
        return self.coordinates.reduced > EXACT_DENSITY

    def fit(
        self,
        *,
        budget: int | None = None,
        max_cycles: int | None = None,
        progress: bool | None = None,
        callback: Callable[[Progress], bool | None] | None = None,
        logger: Logger | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
    ) -> EnergySampler:
        """Train until converged, out of cycles, or out of budget; call again to go on.

        Arguments:
            budget: A new budget of energy evaluations in total, search included.
            max_cycles: A new number of cycles in total; then only the wanted effective sample
                size ends the training earlier.
            progress: Whether to show a progress bar; None to show it on a terminal.
            callback: Called every 100 steps; a true return value stops the training.
            logger: Receives loss, ess, evaluations and log_z.
            checkpoint_path: A file that is written after the search, after every cycle, every
                ten minutes of a long one, and whenever training is interrupted. If it exists,
                training goes on from it. While there is one, SIGTERM too saves and then ends the
                process with status 143 (see :func:`rsm_sampler.interrupts.terminable`).

        Returns:
            The sampler. After Ctrl-C, that of the weights so far.

        Raises:
            SystemExit: After SIGTERM, with a checkpoint.
            EnergyError: If the energy cannot be sampled, and why.
            CheckpointError: If the checkpoint is not of this trainer.
            DivergedError: If the loss is no longer finite, looked at every 100 steps; a
                checkpoint is left as it was.
        """
        path = None if checkpoint_path is None else Path(checkpoint_path)
        if path is not None and path.exists() and self.step == 0 and self.bank is None:
            state = checkpoint.load(path, kind=_KIND, version=_VERSION, least=_VERSION)
            with checkpoint.named(path):
                self.load_state(state)
        if budget is not None:
            if budget < _LEAST_BUDGET:
                raise ValueError(
                    f"budget must be at least {_LEAST_BUDGET} evaluations, got {budget}"
                )
            self.energy.budget = budget
        cycles = self.sizes.max_cycles if max_cycles is None else max_cycles
        self._insists = max_cycles is not None
        bar = tqdm(
            total=0,
            disable=True if not self.team.leads else None if progress is None else not progress,
            unit="step",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}]{postfix}",
        )
        if not self.team.leads:
            logger = None
        with terminable(path is not None):
            self._run(cycles, bar, callback, logger, path)
        return self.sampler()

    def _run(
        self,
        cycles: int,
        bar: tqdm,
        callback: Callable[[Progress], bool | None] | None,
        logger: Logger | None,
        path: Path | None,
    ) -> None:
        """Search, and cycles of training, until it is enough or something ends it."""
        started = time.perf_counter() - self.seconds
        try:
            if self.bank is None:
                self._search(bar.set_description_str)
                self._save(path, started)
            extended = self._enlarge(bar.set_description_str)
            while self._wants_cycle(cycles) or extended:
                extended = False
                if self._train_cycle(bar, started, callback, logger, path):
                    self._save(path, started)
                    break
                whole = self.step_in_cycle >= self._length()  # the budget did not end it early
                with self._whole_or_nothing():
                    self._check(logger, started)
                    self._renew(cycles, bar.set_description_str)
                if whole:
                    self.cycle, self.step_in_cycle = self.cycle + 1, 0
                self._save(path, started)
        except KeyboardInterrupt:
            self._save(path, started)
            if self.bank is None:
                raise
            bar.write("interrupted: returning what was learned so far")
        except DivergedError:
            raise  # nothing here is worth keeping
        except BaseException:
            self._save(path, started)
            raise
        finally:
            self.seconds = time.perf_counter() - started
            bar.close()

    def _wants_cycle(self, cycles: int) -> bool:
        """Whether a cycle is to be finished, or another one to be begun."""
        if self._exhausted():
            return False
        if self.step_in_cycle > 0:
            return True
        return self.cycle < cycles and not self._done() and self._length() > 0

    def _done(self) -> bool:
        """Whether nothing more is to be learned, in the eyes of who called."""
        return self._reached or (self._settled and not self._insists)

    @contextlib.contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """What fails or is interrupted within has not been: a resumed run does it again."""
        drawn, counts = self.generator.get_state(), dict(self.energy.counts)
        checks, bank = len(self.history), self.bank
        try:
            yield
        except BaseException:
            self.generator.set_state(drawn)
            self.energy.counts = counts
            del self.history[checks:]
            if bank is not None and self.bank is not bank:
                self.supply.adopt(bank)
            raise

    def _length(self) -> int:
        """Steps of the present cycle; fewer where the bank has been seen often enough."""
        length = round(self.sizes.steps_per_cycle * 1.5**self.cycle)
        if self.loss == "reverse-sampling" or self.bank is None:
            return length
        plain = self.contexts is None and not isinstance(self.coordinates, MeanFree)
        if self.supply.helped or (plain and self._by_paths):
            length = max(1, length // 2)
        most = max(500, int(self.config.max_epochs * self.bank.ess / self.sizes.batch_size))
        return max(0, min(length, most - self.step + self.step_in_cycle + self._first_step))

    def _exhausted(self) -> bool:
        """Whether the budget has no room for a step of loss (14) and a check."""
        if self.loss != "reverse-sampling" or self.energy.remaining is None:
            return False
        gradient = 1 if self.target == "value" else 2  # counts as one more
        step = gradient * self.sizes.batch_size * self.config.num_draws
        return self.energy.remaining < step + self._check_size()

    def sampler(self) -> EnergySampler:
        """A sampler of the weights so far; later training does not change it."""
        bank, denoiser = self.bank, copy.deepcopy(self.average)
        if self.loss == "mirror-descent":  # whose clean points are the bank's
            denoiser.radius = self.supply.radius
        return EnergySampler(
            denoiser,
            self.affine,
            self.coordinates,
            EDM(self.config.sigma_min, self.config.sigma_max),
            self.config.num_steps,
            self.architecture,
            self.seed,
            MeteredEnergy(
                self._own_energy,
                self.dim,
                context_dim=self.context_dim,
                dtype=self.energy.dtype,
                call_timeout=self.energy.call_timeout,
            ),
            {}
            if bank is None
            else {
                "budget": self.energy.budget,
                "log_z": bank.log_z,
                "log_z_se": bank.log_z_se,
                "ess": bank.ess,
                "method": bank.method,
                "stopped": self._stopped(),
                **self._hints,
                **self._rows(bank),
                **self._seen(),
            },
            [dict(record) for record in self.history],
            dict(self.energy.counts),
            None if self.contexts is None else self.contexts.draw,
        )

    @property
    def plan(self) -> Plan:
        """What the search will do, with its thresholds and budgets; print it."""
        return self.supply.plan(reserve=self._reserve, share=self._share)

    @property
    def _reserve(self) -> int:
        """Evaluations of the budget that are left for checks."""
        return self.sizes.max_cycles * self._check_size()

    @property
    def _share(self) -> float:
        """Share of the rest that the search may use."""
        # With loss (14) the bank only gives location and scale.
        return 0.25 if self.loss == "reverse-sampling" else 1.0

    def explore(self, *, progress: bool | None = None) -> Exploration:
        """The search alone, the first part of :meth:`fit`, which then goes on from it.

        Arguments:
            progress: Whether to show what is being done; None to show it on a terminal.

        Returns:
            Weighted draws, log Z, the basins and a verdict; see
            :class:`~rsm_sampler.exploration.Exploration`.

        Raises:
            EnergyError: If the energy cannot be sampled, and why.
            ValueError: With contexts or given samples, where there is no search of one law.
        """
        if self.contexts is not None or self.samples is not None:
            raise ValueError(
                "explore must be of one law that is searched: no contexts, no samples"
            )
        started = time.perf_counter()
        if self.bank is None:
            bar = tqdm(
                disable=None if progress is None else not progress,
                bar_format="{desc} [{elapsed}]",
            )
            try:
                self._search(bar.set_description_str)
            finally:
                bar.close()
        assert self.bank is not None
        return exploration_of(
            self.bank,
            self.supply.seen,
            self.coordinates,
            self.energy,
            self.config.bank_ess,
            seconds=time.perf_counter() - started,
        )

    def _stopped(self) -> str:
        """Why training would not go on: its own rule, the budget, or the number of cycles."""
        if self._done() or self._length() <= 0:
            return "rule"
        return "budget" if self._exhausted() else "cycles"

    def _rows(self, bank: Bank) -> dict[str, Any]:
        """Effective points of the bank for each context."""
        return (
            {}
            if bank.context is None
            else {"context_ess": LogWeights(bank.log_weight).ess().tolist()}
        )

    def _seen(self) -> dict[str, Any]:
        """What the search saw, in plain values: for the file of the sampler."""
        return self.supply.seen

    # ------------------------------------------------------------------ search

    @property
    def bank(self) -> Bank | None:
        """The weighted points of training; None before the search."""
        return self.supply.bank

    @property
    def affine(self) -> Affine:
        """From the network's coordinates to unbounded ones, as the first bank has them."""
        return self.supply.affine

    def _search(self, report: Callable[[str], None]) -> None:
        if self.samples is not None:
            points = self.coordinates.inverse(self.samples.to(self.device).double())
            self.supply.adopt(Bank.of_samples(points))
        else:
            self.supply.find(
                reserve=self._reserve,
                share=self._share,
                centre=self.centre,
                scale=self.scale,
                report=report,
            )
        if self.supply.context is not None and not self._warm:
            for denoiser in (self.denoiser, self.average):
                network = denoiser.network
                assert isinstance(network, MLP)
                network.standardise_context(self.supply.context)

    def _enlarge(self, report: Callable[[str], None]) -> bool:
        """Whether trained weights got a larger bank."""
        if self.loss == "reverse-sampling":
            return False
        return self.supply.enlarge(2 * self._check_size(), report) and self.step > 0

    def _renew(self, cycles: int, report: Callable[[str], None]) -> None:
        """Let the sampler's own draws be the bank of the next cycle, if there is one."""
        if self.cycle + 1 >= cycles or self._done() or self.loss == "reverse-sampling":
            return
        few = self.coordinates.reduced <= EXACT_DENSITY
        if not self.history or (few and isinstance(self.coordinates, MeanFree)):
            return  # so many draws of a particle network take too long, and its bank is good
        sampler = self.sampler()
        sampler.generator.manual_seed(self.seed + 6101 * (self.cycle + 2))
        if self.supply.renew(sampler, self.history[-1]["ess"], 2 * self._check_size(), report):
            self._first_step = self.step

    # ---------------------------------------------------------------- training

    def _train_cycle(
        self,
        bar: tqdm,
        started: float,
        callback: Callable[[Progress], bool | None] | None,
        logger: Logger | None,
        path: Path | None,
    ) -> bool:
        """One cycle; True if a callback asked to stop."""
        config = self.config
        length = self._length()
        bar.reset(length)
        bar.update(self.step_in_cycle)
        bar.set_description_str(f"cycle {self.cycle + 1}")
        total = torch.zeros((), device=self.device)
        since = 0
        while self.step_in_cycle < length and not self._exhausted():
            warm = min(1.0, (self.step_in_cycle + 1) / 200)
            fall = 0.5 * (1 + math.cos(math.pi * self.step_in_cycle / length))
            peak = config.learning_rate * (1.0 if self.cycle == 0 else 0.6)
            for group in self.optimiser.param_groups:
                group["lr"] = peak * warm * fall + 1e-6
            with self._whole_or_nothing():
                loss = self._loss()
                self.optimiser.zero_grad(set_to_none=True)
                (self.team.size * loss).backward()
            with deferred_interrupt() as interrupted:  # all of the step or nothing of it
                self.optimiser.step()
                self.step += 1
                self.step_in_cycle += 1
                keep = min(0.998, self.step / (self.step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(
                        list(self.average.parameters()), list(self.denoiser.parameters()), 1 - keep
                    )
                total += loss.detach()
                since += 1
            if self.team.most(int(interrupted())):
                raise KeyboardInterrupt
            if self.step % 100 == 0 or self.step_in_cycle == length:
                mean_loss = float(total) / since
                if self.team.most(int(not math.isfinite(mean_loss))):
                    raise DivergedError(
                        f"loss must stay finite, got {mean_loss} within the last {since} of "
                        f"{self.step} steps; a learning_rate below {config.learning_rate} may help"
                    )
                total.zero_()
                since_now, since = since, 0
                ess = self.history[-1]["ess"] if self.history else math.nan
                bar.update(since_now)
                bar.set_postfix_str(
                    f"loss {mean_loss:.4f}, ess {ess:.3f}, {self.evaluations:,} evaluations"
                )
                seconds = time.perf_counter() - started
                if seconds - self.seconds > _SAVE_EVERY:
                    self._save(path, started)
                if logger is not None:
                    logger.log(self.step, loss=mean_loss, evaluations=self.evaluations)
                state = Progress(self.step, self.cycle, mean_loss, ess, self.evaluations, seconds)
                if self._called_back(callback, state):
                    return True
        return False

    def _called_back(
        self, callback: Callable[[Progress], bool | None] | None, state: Progress
    ) -> bool:
        """Whether the leader's callback asks to stop; its exceptions end all processes."""
        code, problem = 0, None
        if callback is not None and self.team.leads:
            try:
                code = int(bool(callback(state)))
            except Exception as error:
                code, problem = 2, error
        code = self.team.most(code)
        if code == 2:
            raise problem or RuntimeError("the callback failed in the leading process")
        return code == 1

    def _loss(self) -> Tensor:
        config, generator = self.config, self.generator
        n = self.sizes.batch_size
        levels = max(1, n // _POINTS_PER_LEVEL)
        n = n // levels * levels
        u = torch.rand(levels, dtype=torch.float32, device=self.device, generator=generator)
        u = (u + torch.arange(levels, device=self.device)) / levels * (len(self._levels) - 1)
        below = u.long().clamp(max=len(self._levels) - 2)
        log_sigma = torch.lerp(self._levels[below], self._levels[below + 1], u - below)
        sigma = log_sigma.exp()
        if self.loss == "reverse-sampling":
            assert self.proposal is not None
            sigma = sigma.repeat_interleave(n // levels)
            x_t = self.proposal.draw(n, sigma, generator=generator).to(sigma)
            return reverse_sampling_loss(
                self._shared,
                self._standard_energy,
                x_t,
                sigma,
                self.kernel,
                config.num_draws,
                target=self.target,
                generator=generator,
            ).mean()
        batch = self.supply.batch(levels, n // levels)
        return denoising_loss(
            self._shared,
            batch.x_0,
            sigma.unsqueeze(-1),
            gradient=batch.gradient,
            stiffness=batch.stiffness,
            jacobian_rows=self._jacobian_rows(levels),
            context=batch.context,
            generator=generator,
        ).mean()

    def _jacobian_rows(self, levels: int) -> int:
        """How many of a batch's noise levels, lowest first, have the Jacobian in their target."""
        if self.supply.jacobian_below == 0:
            return 0
        below = bisect(self._on_host, math.log(self.supply.jacobian_below))
        return levels * below // len(self._on_host)

    def _standard_energy(self, z: Tensor) -> Tensor:
        """Energies of the network's coordinates, up to a constant, in double precision."""
        x, log_det = self.coordinates.forward(self.affine.forward(z.double()))
        # Near zero, where estimates in single precision need their digits.
        log_z = math.nan if self.bank is None else self.bank.log_z
        offset = log_z if math.isfinite(log_z) else 0.0
        inside = self.coordinates.inside(x.detach(), self.energy.dtype)
        if self.target == "value":
            return self.energy(inside, purpose="training") + offset - log_det
        # On the meter a gradient counts as one more. Autograd goes on through the coordinates.
        value, slope = self.energy.value_and_gradient(inside, purpose="training")
        return value + offset + ((x - x.detach()) * slope.to(x)).sum(-1) - log_det

    # ------------------------------------------------------------------ checks

    def _check_size(self) -> int:
        size = self.sizes.check_draws
        if self.energy.budget is not None:
            size = min(size, self.energy.budget // 40)
        return max(16, size)

    def _check(self, logger: Logger | None, started: float) -> None:
        """Exact importance weights of fresh draws, into the history."""
        size = self._check_size()
        record = {"step": float(self.step), "ess": math.nan, "log_z": math.nan}
        if self.energy.remaining is None or self.energy.remaining >= size:
            sampler = self.sampler()
            sampler.generator.manual_seed(self.seed + 7919 * (self.cycle + 2))
            own = sampler.generator
            context = None
            if self.contexts is not None:
                groups = min(64, size // 16)
                size -= size % groups
                context = self.contexts.sample(groups, own).repeat_interleave(size // groups, 0)
            try:
                draws = sampler.weighted_draws(
                    size, energy=self.energy, context=context, purpose="check"
                )
                self.energy.check(draws.x)
                # Every context has its own Z. The record holds the mean of the logarithms, and the
                # least ESS: one sampler has to serve them all.
                log_weight = draws.log_weight.double().view(1 if context is None else groups, -1)
                log_z = torch.logsumexp(log_weight, -1) - math.log(log_weight.shape[-1])
                record["log_z"] = float(log_z.mean())
                record["ess"] = min(map(_share, log_weight))
            except BudgetExceededError:
                pass
        record["evaluations"] = float(self.evaluations)
        record["seconds"] = time.perf_counter() - started
        self.history.append(record)
        if logger is not None:
            logger.log(self.step, **{k: v for k, v in record.items() if k != "step"})

    # -------------------------------------------------------------- checkpoint

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that an exact continuation needs."""
        checkpoint.save(path, self.state(), kind=_KIND, version=_VERSION)

    @staticmethod
    def step_of(path: str | os.PathLike[str]) -> int:
        """Optimiser steps that a checkpoint holds, -1 if there is no such file.

        Raises:
            CheckpointError: If the file is no trainer's, or too old.
        """
        if not Path(path).exists():
            return -1
        state = checkpoint.load(
            path,
            kind=_KIND,
            version=_VERSION,
            least=_VERSION,
            schema=record({"step": integer()}, others=anything),
        )
        return int(state["step"])

    def _save(self, path: Path | None, started: float) -> None:
        self.seconds = time.perf_counter() - started
        if path is not None and self.bank is not None and self.team.leads:
            self.save(path)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values of an exact continuation."""
        return {
            "config": _deciding(self.config),
            "architecture": self.architecture,
            "seed": self.seed,
            "loss": self.loss,
            "target": self.target,
            "gradients": self.gradients,
            "coordinates": self.coordinates.state_dict(),
            "counts": dict(self.energy.counts),
            "budget": self.energy.budget,
            "bank": None if self.bank is None else self.bank.state(),
            "seen": self.supply.seen,
            "denoiser": dict(self.denoiser.state_dict()),
            "average": dict(self.average.state_dict()),
            "optimiser": self.optimiser.state_dict(),
            "generator": checkpoint.generator_state(self.generator),
            "history": self.history,
            "step": self.step,
            "step_in_cycle": self.step_in_cycle,
            "first_step": self._first_step,
            "cycle": self.cycle,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            CheckpointError: If the state is of a trainer with other settings, or none of a
                trainer; the message names the key, and the trainer is as it was.
        """
        _TRAINER(state, "payload")
        mine = {
            "config": _deciding(self.config),
            "architecture": self.architecture,
            "seed": self.seed,
            "loss": self.loss,
            "target": self.target,
            "gradients": self.gradients,
            "coordinates": _numbers(self.coordinates.state_dict()),
        }
        theirs = {**state, "coordinates": _numbers(state["coordinates"])}
        for key, value in mine.items():
            if theirs[key] != value:
                raise checkpoint.CheckpointError(
                    f"checkpoint must be of this trainer, with {key} {value}, got {theirs[key]}"
                )
        for key in ("denoiser", "average"):
            fits(self.denoiser, "the trainer's network")(state[key], f"payload[{key!r}]")
        if max(state["step_in_cycle"], state["first_step"]) > state["step"]:
            raise checkpoint.CheckpointError(
                "payload['step'] must be at least step_in_cycle and first_step, got "
                f"{state['step']}, {state['step_in_cycle']} and {state['first_step']}"
            )
        optimised(self.optimiser)(state["optimiser"], "payload['optimiser']")
        with understood("a trainer"):
            bank = self._bank_kept(state["bank"])
            optimiser = torch.optim.Adam(self.denoiser.parameters())
            optimiser.load_state_dict(state["optimiser"])
            # Whether the numbers fit, before anything of this trainer changes.
            checkpoint.restore_generator(torch.Generator(self.device), state["generator"])
            if bank is not None:
                self.supply.adopt(bank)
        self.energy.counts = dict(state["counts"])
        if self.energy.budget is None:
            self.energy.budget = state["budget"]
        self.denoiser.load_state_dict(state["denoiser"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        checkpoint.restore_generator(self.generator, state["generator"])
        self.history = [dict(record) for record in state["history"]]
        self.step, self.step_in_cycle = state["step"], state["step_in_cycle"]
        self.cycle, self.seconds = state["cycle"], state["seconds"]
        self._first_step = state["first_step"]
        self.supply.seen = state.get("seen", {})

    def _bank_kept(self, state: dict[str, Any] | None) -> Bank | None:
        """The bank that a checkpoint holds, if it is one of this trainer's coordinates."""
        if state is None:
            return None
        if state.get("density") is not None:
            _density(state["density"], "payload['bank']['density']")
        bank, dim = Bank.from_state(state, self.device), self.coordinates.reduced
        tensor(None, None, dim)(bank.points, "payload['bank']['points']")
        rows, columns, _ = bank.points.shape
        if rows * columns < 1:
            raise checkpoint.CheckpointError("payload['bank']['points'] must not be empty")
        weight = tensor(rows, columns, finite=False)
        weight(bank.log_weight, "payload['bank']['log_weight']")
        best = bank.log_weight.amax(-1)
        if not bool(best.isfinite().all()):
            raise checkpoint.CheckpointError(
                "payload['bank']['log_weight'] must have a finite largest one in every row, got "
                f"{best.tolist()[:3]}"
            )
        given = None if self.context_dim is None else tensor(rows, self.context_dim)
        if given is not None:
            given(bank.context, "payload['bank']['context']")
        elif bank.context is not None:
            raise checkpoint.CheckpointError("payload['bank']['context'] must be None")
        # Its weighted moments, in whichever precision: the affine map comes from them.
        Affine(bank.loc, bank.scale_tril)
        tensor(dim)(bank.loc, "payload['bank']['loc']")
        if bank.gradient is not None and bank.gradient.shape != bank.points.shape:
            raise checkpoint.CheckpointError(
                "payload['bank']['gradient'] must have the shape of the points "
                f"{tuple(bank.points.shape)}, got {tuple(bank.gradient.shape)}"
            )
        text()(bank.method, "payload['bank']['method']")
        number(finite=False, nan=True)(bank.log_z, "payload['bank']['log_z']")
        number(finite=False, nan=True)(bank.log_z_se, "payload['bank']['log_z_se']")
        number(least=0.0)(bank.ess, "payload['bank']['ess']")
        if bank.density is not None:
            bank.density.log_prob(bank.points[0, :2])  # its parts fit together
        return bank


def _deciding(config: TrainerConfig) -> dict[str, Any]:
    """What decides the result, up to rounding."""
    return {name: value for name, value in asdict(config).items() if name != "compile"}


def _numbers(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def _share(log_weight: Tensor) -> float:
    """Effective sample size over the number of draws; 0 if no draw has weight."""
    if not bool(log_weight.isfinite().any()) or bool(log_weight.isnan().any()):
        return 0.0
    weight = torch.softmax(log_weight, 0)
    return float(1 / weight.square().sum()) / len(log_weight)
