r"""The result of training: a sampler with a density, diagnostics, and a file of its own.

An :class:`EnergySampler` is a denoiser in standardised coordinates z (see
:mod:`rsm_sampler.target.coordinates`) with what is needed to speak in the user's coordinates x. It
knows no energy by itself, so it can be saved and loaded without one;
:meth:`EnergySampler.diagnose` asks for it.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler import checkpoint
from rsm_sampler.ancestral import Ancestral, Multistep
from rsm_sampler.checked import checked
from rsm_sampler.denoisers import Denoiser
from rsm_sampler.estimators import effective_sample_size
from rsm_sampler.flows import DDIM, Heun
from rsm_sampler.montecarlo.run import RefineResult, refine
from rsm_sampler.montecarlo.weights import cumulative_weight, stratified_indices
from rsm_sampler.samplers import Langevin, Sampler
from rsm_sampler.schedules import EDM
from rsm_sampler.schema import (
    SEED,
    bounded,
    entries,
    fits,
    held,
    integer,
    items,
    number,
    optional,
    plain,
    record,
    tensor,
    text,
    understood,
)
from rsm_sampler.target.coordinates import Affine, Coordinates, MeanFree, coordinates_of
from rsm_sampler.target.energy import MeteredEnergy, metered
from rsm_sampler.verdict.diagnosis import Diagnosis, diagnose
from rsm_sampler.verdict.referee import RefereeName

__all__ = ["EXACT_DENSITY", "EnergySampler", "WeightedDraws"]

EXACT_DENSITY = 16
"""Most dimensions in which importance weights come from densities, not from paths."""

ContextLike = (
    Float[Tensor, " context_dim"] | Float[Tensor, "n context_dim"] | Sequence[float] | None
)
Method = Literal["heun", "ddim", "ancestral", "multistep", "langevin"]
_KIND, _VERSION, _LEAST = "sampler", 4, 3
_FLOATS = (torch.float32, torch.float64)
_SIZE = integer(1, 2**31)
_NETWORK = entries(tensor())
AFFINE = record(
    {"loc": tensor(None, dtypes=_FLOATS), "scale_tril": tensor(None, None, dtypes=_FLOATS)}
)
"""What a file says of :class:`~rsm_sampler.target.coordinates.Affine`."""
COORDINATES = record(
    {},
    {
        "low": tensor(None, dtypes=_FLOATS, finite=False),
        "high": tensor(None, dtypes=_FLOATS, finite=False),
        "normal": tensor(dtypes=(torch.bool,)),
        "particles": tensor(2, dtypes=(torch.int64,)),
    },
)
"""What a file says of coordinates."""
ARCHITECTURE = record(
    {"width": _SIZE, "depth": _SIZE},
    {
        "dim": _SIZE,
        "context_dim": optional(integer(0, 2**31)),
        "frequencies": integer(0, 2**31),
        "bandwidth": number(above=0.0),
        "context_bandwidth": number(above=0.0),
        "harmonics": integer(0, 2**31),
        "num_particles": integer(2, 2**31),
        "space_dim": _SIZE,
        "radial": _SIZE,
        "vectors": _SIZE,
    },
)
"""What a file says of a network, as :meth:`~rsm_sampler.denoisers.Denoiser.build` takes it."""
COUNTS = entries(integer())
HISTORY = items(entries(number(finite=False, nan=True)))
_SAMPLER = record(
    {
        "architecture": ARCHITECTURE,
        "network": _NETWORK,
        "affine": AFFINE,
        "coordinates": COORDINATES,
        "sigma": items(number(above=0.0), length=2),
        "num_steps": integer(1, 1_000_000),
        "seed": SEED,
        "search": record(
            {},
            {
                "budget": optional(integer()),
                "log_z": number(finite=False, nan=True),
                "log_z_se": number(finite=False, nan=True),
                "ess": number(least=0.0, finite=False, nan=True),
                "method": text(),
            },
            others=plain,
        ),
        "history": HISTORY,
        "counts": COUNTS,
    },
    {"radius": number(above=0.0, finite=False)},  # version 3 had none
)
_CHUNK = 4096  # draws worked on at a time: bounds the memory and suits the cache
_SAMPLERS: dict[str, type[Sampler]] = {
    "heun": Heun,
    "ddim": DDIM,
    "ancestral": Ancestral,
    "multistep": Multistep,
    "langevin": Langevin,
}


@checked(skip=("__init__",))
@dataclass(frozen=True)
class WeightedDraws:
    """Draws of a sampler with their importance log-weights.

    Attributes:
        x: Draws, (n, dim), in double precision like all that follows.
        log_weight: ``-energy - log q``, (n); their log-mean-exp estimates log Z.
        energy: Energies, (n), of exactly these draws.
        log_prob: Log-density of the process that made the draws, (n); None for path weights.
    """

    x: Tensor
    log_weight: Tensor
    energy: Tensor
    log_prob: Tensor | None

    @property
    def ess(self) -> float:
        """Effective sample size, in draws."""
        return float(effective_sample_size(self.log_weight))

    def resample(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n dim"]:
        """Resample n draws by weight, to be reported apart from raw ones."""
        return self.x[self._by_weight(n, generator)]

    def _by_weight(self, n: int, generator: torch.Generator | None) -> Tensor:
        cumulative = cumulative_weight(self.x, self.log_weight)
        return stratified_indices(cumulative, n, generator)

    def to_arviz(
        self,
        variables: Callable[[Tensor], Mapping[str, Tensor]] | Sequence[str] | None = None,
        *,
        resampled: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:  # noqa: ANN401
        """The draws as ArviZ's InferenceData, for its tables and plots.

        ArviZ takes all draws for equally likely. So either ask for resampled ones, or use the
        log-weights, which stand in ``sample_stats.log_weight``. The draws are independent: one
        chain, whose effective sample sizes are those of independent draws, whatever the weights.

        Arguments:
            variables: What turns points (n, dim) into named values (n, ...), such as the
                ``constrain`` of :func:`energies.from_numpyro`; or a name for each coordinate. One
                variable ``x`` if None.
            resampled: Number of draws to resample by weight; None for the draws as they are.
            generator: Source of randomness of resampling.

        Returns:
            An ``arviz.InferenceData`` with the groups ``posterior`` and ``sample_stats`` (``lp``,
            minus the energy), each value with shape (1, n, ...).

        Raises:
            ImportError: Without ArviZ.
            ValueError: If the names are not one for each coordinate, or resampled is below 1.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError(
                "to_arviz needs arviz: pip install 'rsm-sampler[arviz]'", name="arviz"
            ) from error
        index = torch.arange(len(self.x), device=self.x.device)
        if resampled is not None:
            if resampled < 1:
                raise ValueError(f"resampled must be at least 1, got {resampled}")
            index = self._by_weight(resampled, generator)
        x, lp = self.x[index], -self.energy[index]
        if variables is None:
            named: Mapping[str, Tensor] = {"x": x}
        elif callable(variables):
            named = variables(x)
        else:
            if len(variables) != x.shape[-1]:
                raise ValueError(
                    f"variables must be {x.shape[-1]} names, got {len(variables)}: {variables}"
                )
            named = dict(zip(variables, x.unbind(-1), strict=True))
        stats = {"lp": lp}
        if resampled is None:
            stats["log_weight"] = self.log_weight[index]
        return arviz.from_dict(posterior=_one_chain(named), sample_stats=_one_chain(stats))


def coordinates_kept(state: dict[str, Tensor], reduced: int) -> Coordinates:
    """The coordinates that a file holds, if they are those of points u of a given length.

    Arguments:
        state: Their ``state_dict``, as a schema allows it.
        reduced: Length of u.

    Raises:
        CheckpointError: If they are of another length.
        ValueError: If there are no such coordinates.
    """
    if set(state) - {"normal"} not in ({"low", "high"}, {"particles"}):
        raise checkpoint.CheckpointError(
            f"coordinates must have low and high, or particles, got {sorted(state)}"
        )
    if "particles" in state:
        n, space = state["particles"].tolist()
        length = (n - 1) * space
    else:
        length = len(state["low"])
    if length != reduced:  # before anything of that length is made
        raise checkpoint.CheckpointError(
            f"coordinates must be {reduced}, as many as the affine map has, got {length}"
        )
    return coordinates_of(state)


def _network_of(state: dict[str, Any], coordinates: Coordinates) -> Denoiser:
    """The denoiser that a sampler's file describes."""
    architecture, tensors = state["architecture"], state["network"]
    if isinstance(coordinates, MeanFree):
        known = {"num_particles": coordinates.num_particles, "space_dim": coordinates.space_dim}
    else:
        known = {"dim": coordinates.dim}
    for name, value in known.items():
        if architecture.get(name) != value or ("dim" in known) != ("dim" in architecture):
            raise checkpoint.CheckpointError(
                f"payload['architecture'] must have {name} {value}, as the coordinates say, got "
                f"{architecture}"
            )
    if architecture["depth"] > len(tensors):
        raise checkpoint.CheckpointError(
            f"payload['architecture']['depth'] must be at most the number of tensors of the "
            f"network, {len(tensors)}, got {architecture['depth']}"
        )
    with bounded(held(tensors)):
        denoiser = Denoiser.build(architecture, torch.Generator())
    fits(denoiser, "its architecture")(tensors, "payload['network']")
    denoiser.load_state_dict(tensors)
    denoiser.radius = state.get("radius", math.inf)
    return denoiser


def _one_chain(values: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().cpu().numpy()[None] for name, value in values.items()}


@checked(finite=("x",), skip=("__init__",))
@dataclass
class EnergySampler:
    """Independent draws of a learned law, and its log-density.

    Attributes:
        denoiser: The denoiser, in coordinates z.
        affine: From z to unbounded coordinates.
        coordinates: From unbounded to the user's coordinates.
        schedule: Noise levels, in units of z.
        num_steps: Steps of the default sampler.
        architecture: Arguments of the network, to build it again.
        seed: Seed of the sampler's own generator.
        energy: The energy it was trained on, on a meter of its own without a budget; None after
            loading without one.
        search: What the search found: ``log_z``, ``log_z_se``, ``ess``, ``method``; and the
            training's ``budget``.
        history: Records of the training, one per check.
        counts: Energy evaluations of search and training, by purpose.
    """

    denoiser: torch.nn.Module
    affine: Affine
    coordinates: Coordinates
    schedule: EDM
    num_steps: int
    architecture: dict[str, Any]
    seed: int
    energy: MeteredEnergy | None = None
    search: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    draw_context: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed + 1)

    @property
    def dim(self) -> int:
        """Length of a point."""
        return self.coordinates.dim

    @property
    def context_dim(self) -> int | None:
        """Length of a context, None without."""
        return self.architecture.get("context_dim")

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.denoiser.parameters()).device

    def sample(
        self,
        n: int,
        *,
        context: ContextLike = None,
        method: Method | None = None,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        chunk: int = _CHUNK,
    ) -> Float[Tensor, "n dim"]:
        """Independent draws, raw: neither reweighted nor refined.

        The network works in single precision, in coordinates of width one; location and scale are
        applied in double precision, and so are the draws.

        Arguments:
            n: Number of draws.
            context: One context for all draws, or one for each.
            method: ``"heun"`` (the probability-flow ODE), ``"ddim"``, ``"ancestral"``,
                ``"multistep"`` or ``"langevin"``. If None, ``"heun"``, but for particles
                ``"multistep"``: errors that the ODE keeps its noise forgets.
            num_steps: Number of noise levels; the trainer's choice if None, and four times that
                where the method is chosen for particles.
            generator: Source of randomness; the sampler's own if None.
            chunk: Draws worked on at a time; bounds the memory and suits the cache.

        Raises:
            ValueError: If n is negative, chunk not positive, the context does not fit, or the
                method is unknown.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        context = self._context(n, context)
        generator = self.generator if generator is None else generator
        if method is None:
            method = "multistep" if isinstance(self.coordinates, MeanFree) else "heun"
            if method == "multistep" and num_steps is None:
                num_steps = 4 * self.num_steps
        sampler = self.process(method, num_steps)
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        pieces = [torch.zeros(0, self.dim, dtype=torch.float64, device=self.device)]
        for i in range(0, n, chunk):
            piece = None if context is None else context[i : i + chunk].to(self._dtype)
            z = sampler.sample(min(chunk, n - i), context=piece, generator=generator)
            pieces.append(self._to_x(z)[0])
        return torch.cat(pieces)

    def process(self, method: Method = "heun", num_steps: int | None = None) -> Sampler:
        """The sampling process in coordinates z, for use on its own."""
        if method not in _SAMPLERS:
            raise ValueError(f"method must be one of {sorted(_SAMPLERS)}, got {method!r}")
        sigmas = self.schedule.sigmas(self.num_steps if num_steps is None else num_steps)
        return _SAMPLERS[method](self.denoiser, sigmas, dim=self.coordinates.reduced)

    def sample_with_log_prob(
        self,
        n: int,
        *,
        context: ContextLike = None,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
        """Draws of the ODE sampler with the exact log-density of the map that made them.

        Both in double precision, (n, dim) and (n).
        """
        context = self._context(n, context)
        context = None if context is None else context.to(self._dtype)
        flow = self.process("heun", num_steps)
        assert isinstance(flow, Heun)
        generator = self.generator if generator is None else generator
        z, log_prob = flow.sample_with_log_prob(n, context=context, generator=generator)
        x, log_det = self._to_x(z)
        return x, log_prob - log_det

    def weighted_draws(
        self,
        n: int,
        *,
        energy: Callable[..., Tensor] | None = None,
        context: ContextLike = None,
        paths: bool | None = None,
        num_steps: int | None = None,
        purpose: str = "diagnosis",
        generator: torch.Generator | None = None,
    ) -> WeightedDraws:
        """Draws with exact importance weights.

        By the ODE sampler and its density, or by the ancestral one and its path weights, which
        cost no derivatives but vary more where steps are few.

        Arguments:
            n: Number of draws.
            energy: The energy, plain or on a meter; the sampler's own if None.
            context: One context for all draws, or one for each.
            paths: Whether weights are those of paths; beyond 16 dimensions if None.
            num_steps: Number of noise levels; the sampler's if None, four times that for paths.
            purpose: The energy's account.
            generator: Source of randomness; the sampler's own if None.

        Raises:
            ValueError: If n is below 1, there is no energy, or the context does not fit.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        meter = self._energy(energy)
        if not (self.coordinates.reduced > EXACT_DENSITY if paths is None else paths):
            x, log_prob = self.sample_with_log_prob(
                n, context=context, num_steps=num_steps, generator=generator
            )
            value = self._energies(meter, x, self._context(n, context), purpose)
            return WeightedDraws(x, -value - log_prob, value, log_prob)
        full = self._context(n, context)
        given = None if full is None else full.to(self._dtype)
        chain = self.process("ancestral", num_steps or 4 * self.num_steps)
        assert isinstance(chain, Ancestral)
        generator = self.generator if generator is None else generator
        ends: list[tuple[Tensor, Tensor]] = []
        own: Tensor | None = None

        def in_z(z: Tensor, *_: Tensor) -> Tensor:
            x, log_det = self._to_x(z)
            value = self._energies(meter, x, own, purpose)
            ends.append((x, value))
            return value - log_det

        kept = []
        for i in range(0, n, _CHUNK):
            own = None if full is None else full[i : i + _CHUNK]
            piece = None if given is None else given[i : i + _CHUNK]
            _, log_weight = chain.sample_with_path_weight(
                min(_CHUNK, n - i), in_z, context=piece, generator=generator
            )
            kept.append((*ends.pop(), log_weight))
        x, value, log_weight = map(torch.cat, zip(*kept, strict=True))
        return WeightedDraws(x, log_weight, value, None)

    def refine(
        self,
        x: Float[Tensor, "n dim"],
        *,
        steps: int = 50,
        context: ContextLike = None,
        method: Literal["rw", "mala", "hmc"] = "rw",
        generator: torch.Generator | None = None,
    ) -> RefineResult:
        """Short Metropolis chains that leave the target invariant, from given points.

        Repairs the shape of modes, not their weights. Report refined samples apart from raw ones;
        the result counts its evaluations, and so does the sampler's own meter as ``"refinement"``.

        Arguments:
            x: Points, (n, dim), such as raw draws.
            steps: Steps of every chain.
            context: One context for all points, or one for each.
            method: ``"rw"`` needs energy values only.
            generator: Source of randomness; the sampler's own if None.

        Returns:
            The refined points in ``x``, energy drift, acceptance and evaluations; see
            :func:`rsm_sampler.montecarlo.run.refine`.

        Raises:
            ValueError: If the sampler has no energy, or an argument is out of range.
        """
        meter, full = self._energy(None), self._context(len(x), context)
        x = x.to(device=self.device, dtype=torch.float64)
        z = self.affine.inverse(self.coordinates.inverse(x))

        def in_z(points: Tensor, own: Tensor | None = None) -> Tensor:
            moved, log_det = self._to_x(points)
            return self._energies(meter, moved, own, "refinement") - log_det

        generator = self.generator if generator is None else generator
        result = refine(in_z, z, context=full, steps=steps, method=method, generator=generator)
        return dataclasses.replace(result, x=self._to_x(result.x)[0])

    def log_prob(
        self,
        x: Float[Tensor, "n dim"],
        *,
        context: ContextLike = None,
        num_steps: int | None = None,
        with_error: bool = False,
    ) -> Float[Tensor, " n"] | tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Log-density at given points, by the probability-flow ODE with exact divergence.

        In double precision, as far as location, scale and bounds go; the network's part is in
        single precision.

        Arguments:
            x: Points, (n, dim); outside of the bounds the log-density is -inf.
            context: One context for all points, or one for each.
            num_steps: Number of noise levels; twice the sampler's if None.
            with_error: Whether to return the step-doubling estimate of the error as well.

        Raises:
            ValueError: If x has another shape.
        """
        if x.dim() != 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (n, {self.dim}), got {tuple(x.shape)}")
        x = x.to(device=self.device, dtype=torch.float64)
        context = self._context(len(x), context)
        context = None if context is None else context.to(self._dtype)
        u = self.coordinates.inverse(x)
        inside = ~u.isnan().any(-1)
        u = torch.where(inside.unsqueeze(-1), u, self.affine.loc.to(u))
        z = self.affine.inverse(u).to(self._dtype)
        flow = self.process("heun", 2 * self.num_steps if num_steps is None else num_steps)
        assert isinstance(flow, Heun)
        log_prob, error = flow.log_prob(z, context=context)
        log_det = self.coordinates.forward(u)[1] + self.affine.log_det
        log_prob = torch.where(inside, log_prob - log_det, -torch.inf)
        return (log_prob, error) if with_error else log_prob

    def diagnose(
        self,
        n: int | None = None,
        *,
        energy: Callable[..., Tensor] | None = None,
        context: Float[Tensor, " context_dim"] | None = None,
        witness_evaluations: int | None = None,
        effort: float = 1.0,
        referee: RefereeName | None = None,
        seed: int | None = None,
    ) -> Diagnosis:
        """How far to trust the samples; see :func:`rsm_sampler.verdict.diagnosis.diagnose`."""
        return diagnose(
            self,
            n,
            energy=self._energy(energy),
            context=context,
            witness_evaluations=witness_evaluations,
            effort=effort,
            referee=referee,
            seed=self.seed if seed is None else seed,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sampler, without its energy, to a file."""
        checkpoint.save(path, self.state(), kind=_KIND, version=_VERSION)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that make the same sampler again."""
        return {
            "architecture": self.architecture,
            "network": dict(self.denoiser.state_dict()),
            "radius": self.denoiser.radius,
            "affine": self.affine.state_dict(),
            "coordinates": self.coordinates.state_dict(),
            "sigma": [self.schedule.sigma_min, self.schedule.sigma_max],
            "num_steps": self.num_steps,
            "seed": self.seed,
            "search": self.search,
            "history": self.history,
            "counts": self.counts,
        }

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        energy: Callable[..., Tensor] | None = None,
        device: str | torch.device = "cpu",
    ) -> "EnergySampler":
        """Read a sampler; loading executes nothing.

        Arguments:
            path: The file.
            energy: The energy, if it is to be diagnosed.
            device: Where to put it.

        Raises:
            CheckpointError: If the file is missing, corrupt, no sampler, or of an older version
                of the library, whose networks computed something else; or if what it holds is
                not what its architecture says. Nothing larger than the file is allocated.
        """
        state = checkpoint.load(path, kind=_KIND, version=_VERSION, least=_LEAST)
        with checkpoint.named(path):
            return cls.from_state(state, energy=energy, device=device)

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        *,
        energy: Callable[..., Tensor] | None = None,
        device: str | torch.device = "cpu",
    ) -> "EnergySampler":
        """The sampler of :meth:`state`.

        Arguments:
            state: What :meth:`state` returned.
            energy: The energy, if it is to be diagnosed.
            device: Where to put it.

        Raises:
            CheckpointError: If the state is not one of a sampler; the message names the key.
        """
        device = torch.device(device)
        _SAMPLER(state, "payload")
        with understood("a sampler"):
            affine = Affine(**state["affine"])
            coordinates = coordinates_kept(state["coordinates"], len(affine.loc))
            denoiser = _network_of(state, coordinates)
            schedule = EDM(*state["sigma"])
        dim, context_dim = coordinates.dim, state["architecture"].get("context_dim")
        return cls(
            denoiser.to(device).requires_grad_(False),
            affine,
            coordinates,
            schedule,
            state["num_steps"],
            state["architecture"],
            state["seed"],
            None if energy is None else metered(energy, dim, context_dim=context_dim),
            state["search"],
            state["history"],
            state["counts"],
        )

    def _to_x(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The point x of z, and log|det dx/dz|, both in double precision."""
        x, log_det = self.coordinates.forward(self.affine.forward(z.double()))
        return x, log_det + self.affine.log_det

    def _energies(
        self, meter: MeteredEnergy, x: Tensor, context: Tensor | None, purpose: str
    ) -> Tensor:
        """Energies of points that stay inside the bounds in the meter's precision."""
        return meter(self.coordinates.inside(x, meter.dtype), context, purpose=purpose)

    @property
    def _dtype(self) -> torch.dtype:
        """Precision of the network."""
        return next(self.denoiser.parameters()).dtype

    def _energy(self, energy: Callable[..., Tensor] | None) -> MeteredEnergy:
        energy = self.energy if energy is None else energy
        if energy is None:
            raise ValueError("energy must be given for a sampler that was loaded without one")
        return metered(energy, self.dim, context_dim=self.context_dim)

    def _context(self, n: int, context: Tensor | Sequence[float] | None) -> Tensor | None:
        if (context is None) != (self.context_dim is None):
            rule = "None" if self.context_dim is None else f"of length {self.context_dim}"
            raise ValueError(f"context must be {rule}, got {context}")
        if context is None or self.context_dim is None:
            return None
        context = torch.as_tensor(context, dtype=torch.float64, device=self.device)
        if context.shape not in {(self.context_dim,), (n, self.context_dim)}:
            raise ValueError(
                f"context must have shape ({self.context_dim},) or ({n}, {self.context_dim}), "
                f"got {tuple(context.shape)}"
            )
        return context.expand(n, self.context_dim)
