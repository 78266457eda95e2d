r"""Energies whose answer is known.

A target is an energy :math:`E` together with what a sampler of :math:`p(x) = e^{-E(x)} / Z` should
find: the normaliser, independent draws, the modes and their weights, and the probability of any
cell of a grid. Each family sits in a file of its own and calls the constructor below with what it
knows; a sampler only ever sees ``target(x)``.

Change of scale. With :math:`y = m + s x` (:math:`s > 0` per coordinate) and
:math:`E'(y) = E((y - m) / s)`,

.. math:: Z' = \int e^{-E'(y)} dy = Z \prod_i s_i .

:class:`AffineTarget` carries every piece of knowledge across.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from energies.quadrature import integrate_cells
from rsm_sampler.checked import checked

__all__ = ["AffineTarget", "Constants", "Target"]


@checked
class Constants:
    """Named float64 tensors, handed out in the dtype and on the device of an argument.

    Conversions are kept, so that a loop over batches on an accelerator copies each constant once.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self._converted: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        """Return the named constants in the dtype and on the device of `x`."""
        return tuple(self._convert(name, x.dtype, x.device) for name in names)

    def _convert(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, dtype, device)
        if key not in self._converted:
            with torch.inference_mode(
                False
            ):  # an inference tensor could not be used for gradients later
                self._converted[key] = self.tensors[name].to(device=device, dtype=dtype)
        return self._converted[key]


def _as_vector(name: str, value: float | Sequence[float] | Tensor, dim: int) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    if vector.ndim > 1 or (vector.ndim == 1 and len(vector) != dim):
        raise ValueError(
            f"{name} must be a number or have shape ({dim},), got shape {tuple(vector.shape)}"
        )
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {vector.tolist()}")
    return vector.expand(dim).clone()


@checked
class Target(ABC):
    r"""An energy with a known answer.

    A subclass implements :meth:`energy`, and :meth:`_draw` if it can be sampled exactly. Batches
    have any shape :math:`(*)`; dtype and device of results are those of the argument.

    Arguments:
        dim: Number of coordinates.
        name: Name for reports and command lines.
        extent: Lower and upper corner, each with shape :math:`(d)`, of a box that holds all but
            about :math:`10^{-6}` of the mass.
        log_z: :math:`\log \int e^{-E(x)} dx`, or ``None`` if unknown.
        modes: Centres of the modes with shape :math:`(m, d)`, or ``None`` if they are not points
            or too many.
        mode_weights: Share of the mass that belongs to each mode, with shape :math:`(m)`.
    """

    def __init__(
        self,
        *,
        dim: int,
        name: str,
        extent: tuple[Tensor, Tensor],
        log_z: float | None = None,
        modes: Tensor | None = None,
        mode_weights: Tensor | None = None,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.name = name
        self.extent = extent
        self.log_z = log_z
        self.modes = modes
        self.mode_weights = mode_weights

    def __repr__(self) -> str:
        log_z = "None" if self.log_z is None else f"{self.log_z:.4f}"
        return f"{type(self).__name__}(name={self.name!r}, dim={self.dim}, log_z={log_z})"

    def __call__(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        r"""Energy of every point; low is likely.

        Arguments:
            x: Points with shape :math:`(*, d)`.

        Returns:
            The energies :math:`E(x)` with shape :math:`(*)`.

        Raises:
            ValueError: If the last dimension of `x` is not `dim`.
        """
        self._check(x)
        return self.energy(x)

    @abstractmethod
    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        r"""Energy of points with shape :math:`(*, d)`, unchecked: call the target instead."""

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        r"""Normalised log-density :math:`-E(x) - \log Z`, with shape :math:`(*)`.

        Raises:
            ValueError: If `log_z` is unknown.
        """
        return -self(x) - self._known_log_z()

    def sample(
        self,
        sample_shape: int | Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "*shape dim"]:
        r"""Independent draws from the target.

        Draws are made in float64 and rounded once, so that one seed gives the same points in every
        dtype.

        Arguments:
            sample_shape: Shape of the batch of draws, or their number.
            generator: Source of randomness; it also decides where the draws are made.
            dtype: Type of the result.
            device: Device of the result.

        Returns:
            The points, with shape :math:`(*, d)`.

        Raises:
            NotImplementedError: If the target has no exact sampler.
        """
        shape = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        where = torch.device(device) if generator is None else generator.device
        with torch.no_grad():
            draws = self._draw(math.prod(shape), generator, where)
        return draws.reshape(*shape, self.dim).to(device=device, dtype=dtype)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw `n` points, float64, with shape (n, dim), on the generator's device."""
        raise NotImplementedError(f"{self.name} has no exact sampler")

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch modes"]:
        r"""Share of every mode in every point, with shape :math:`(*, m)`; rows add to one.

        Mixtures give the posterior probability of each component, other targets all to the nearest
        mode.

        Raises:
            ValueError: If the modes are unknown.
        """
        self._check(x)
        if self.modes is None:
            raise ValueError(f"{self.name} has no finite list of modes")
        modes = self.modes.to(x)
        nearest = torch.cdist(x.reshape(-1, self.dim), modes).argmin(-1).reshape(x.shape[:-1])
        return torch.nn.functional.one_hot(nearest, len(modes)).to(x.dtype)

    def cell_masses(
        self,
        edges_x: Float[Tensor, " nx"],
        edges_y: Float[Tensor, " ny"] | None = None,
        *,
        tolerance: float = 1e-8,
    ) -> Float[Tensor, "*cells"]:
        r"""Probability of every cell of a grid, for targets in one or two dimensions.

        Adaptive quadrature of the density itself (the value at a cell's centre misses a thin
        ring). The masses add to one up to what lies outside of the grid.

        Arguments:
            edges_x: Increasing edges of the cells along the first axis, with shape
                :math:`(n_x + 1)`.
            edges_y: Edges along the second axis, with shape :math:`(n_y + 1)`; left out in one
                dimension.
            tolerance: Bound on the estimated total error.

        Returns:
            The probabilities, float64, with shape :math:`(n_x, n_y)` or :math:`(n_x)`, indexed as
            in :func:`numpy.histogram2d`.

        Raises:
            ValueError: If the number of edge lists is not `dim`, the edges are not finite and
                increasing, or `log_z` is unknown.

        Example:
            >>> from energies import Rings
            >>> halves = torch.tensor([-6.0, 0.0, 6.0])
            >>> Rings().cell_masses(halves, halves)
            tensor([[0.2500, 0.2500],
                    [0.2500, 0.2500]], dtype=torch.float64)
        """
        edges = self._edges(edges_x, edges_y)
        log_z = self._known_log_z()
        low, high = self.extent
        with torch.no_grad():
            return integrate_cells(
                lambda x: (-self.energy(x) - log_z).exp(),
                edges,
                resolution=((high - low) / 32).tolist(),
                tolerance=tolerance,
            )

    def affine(
        self,
        shift: float | Sequence[float] | Tensor = 0.0,
        scale: float | Sequence[float] | Tensor = 1.0,
    ) -> AffineTarget:
        r"""The law of :math:`m + s x`, as a target whose energy is :math:`E((y - m) / s)`."""
        return AffineTarget(self, shift, scale)

    def _known_log_z(self) -> float:
        if self.log_z is None:
            raise ValueError(f"log_z of {self.name} is unknown")
        return self.log_z

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (*, {self.dim}), got {tuple(x.shape)}")

    def _edges(self, edges_x: Tensor, edges_y: Tensor | None) -> list[Tensor]:
        edges = [edges_x] if edges_y is None else [edges_x, edges_y]
        if len(edges) != self.dim:
            raise ValueError(
                f"cell_masses needs one list of edges per dimension ({self.dim}), got {len(edges)}"
            )
        edges = [torch.as_tensor(e).detach().to("cpu", torch.float64) for e in edges]
        for name, e in zip(("edges_x", "edges_y"), edges, strict=False):
            if (
                e.ndim != 1
                or len(e) < 2
                or not bool(e.isfinite().all())
                or not bool((e.diff() > 0).all())
            ):
                raise ValueError(
                    f"{name} must be at least two finite, increasing numbers, got {e.tolist()}"
                )
        return edges


@checked
class AffineTarget(Target):
    r"""A target in other units: the law of :math:`y = m + s x` with :math:`x` from `base`.

    .. math:: E'(y) = E\left(\frac{y - m}{s}\right), \qquad \log Z' = \log Z + \sum_i \log s_i

    Modes, extent, draws and cell masses follow; `mode_weights` and responsibilities stay.

    Arguments:
        base: The target in its own units.
        shift: Shift :math:`m`, a number or one per coordinate.
        scale: Scale :math:`s > 0`, a number or one per coordinate.
        name: Name of the new target; that of `base` if left out.

    Raises:
        ValueError: If `shift` or `scale` has the wrong shape or is not finite, or `scale` is not
            positive.

    Example:
        >>> from energies import GaussianMixture
        >>> unit = GaussianMixture.gmm40().affine(scale=1 / 50)
        >>> round(unit.log_z, 4)  # two dimensions
        -7.824
    """

    def __init__(
        self,
        base: Target,
        shift: float | Sequence[float] | Tensor = 0.0,
        scale: float | Sequence[float] | Tensor = 1.0,
        *,
        name: str | None = None,
    ) -> None:
        self.base = base
        self.shift = _as_vector("shift", shift, base.dim)
        self.scale = _as_vector("scale", scale, base.dim)
        if not bool((self.scale > 0).all()):
            raise ValueError(f"scale must be positive, got {self.scale.tolist()}")
        self._constants = Constants(shift=self.shift, scale=self.scale)
        low, high = base.extent
        super().__init__(
            dim=base.dim,
            name=base.name if name is None else name,
            extent=(self.shift + self.scale * low, self.shift + self.scale * high),
            log_z=None if base.log_z is None else base.log_z + float(self.scale.log().sum()),
            modes=None if base.modes is None else self.shift + self.scale * base.modes,
            mode_weights=base.mode_weights,
        )

    def _inverse(self, x: Tensor) -> Tensor:
        shift, scale = self._constants.like(x, "shift", "scale")
        return (x - shift) / scale

    def energy(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Energy of the base target at the point brought back to its units."""
        return self.base.energy(self._inverse(x))

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch modes"]:
        """Responsibilities of the base target's modes."""
        self._check(x)
        return self.base.responsibilities(self._inverse(x))

    def cell_masses(
        self,
        edges_x: Float[Tensor, " nx"],
        edges_y: Float[Tensor, " ny"] | None = None,
        *,
        tolerance: float = 1e-8,
    ) -> Float[Tensor, "*cells"]:
        """Cell probabilities, from the base target on the grid brought back to its units."""
        edges = self._edges(edges_x, edges_y)
        back = [(e - m) / s for e, m, s in zip(edges, self.shift, self.scale, strict=True)]
        return self.base.cell_masses(*back, tolerance=tolerance)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        draws = self.base._draw(n, generator, device)
        return self.shift.to(device) + self.scale.to(device) * draws
