r"""Posteriors of probabilistic programs as energies: NumPyro models.

A model's latent variables are bounded, positive, or on a simplex; its posterior is sampled in
unconstrained coordinates u with :math:`\theta = c(u)`. There the energy is

.. math:: E(u) = -\log p(\theta, y) - \log \left| \det \frac{\partial c}{\partial u} \right| ,

so that :math:`\log Z` is the log-evidence :math:`\log p(y)`, up to constants that the model's
own densities leave out (NumPyro leaves out none).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.checked import checked

__all__ = ["NumPyroEnergy", "from_numpyro"]


@checked
class NumPyroEnergy:
    """The posterior of a NumPyro model as an energy; see :func:`from_numpyro`.

    Attributes:
        dim: Number of unconstrained coordinates.
        names: A name for each of them, such as ``theta[2]``.
    """

    def __init__(
        self, model: Callable[..., Any], arguments: tuple, options: dict[str, Any], seed: int
    ) -> None:
        try:
            import jax
            from jax.flatten_util import ravel_pytree
            from numpyro.infer.util import initialize_model
        except ImportError as error:
            raise ImportError(
                "from_numpyro needs numpyro: pip install 'rsm-sampler[numpyro]'", name="numpyro"
            ) from error
        try:
            inspect.signature(model).bind(*arguments, **options)
        except TypeError as error:
            raise TypeError(
                f"arguments must be those of the model {inspect.signature(model)}, got "
                f"{len(arguments)} by position and {sorted(options)} by name: {error}"
            ) from None
        self._jax = jax
        with jax.enable_x64(True):
            _check_sites(model, arguments, options, seed)
            found = initialize_model(
                jax.random.PRNGKey(seed), model, model_args=arguments, model_kwargs=options
            )
            start = found.param_info.z
            flat, unravel = ravel_pytree(start)
            self.dim = int(flat.size)
            if self.dim == 0:
                raise ValueError("model must have a continuous latent variable, got none")

            def potential(u: Any) -> Any:  # noqa: ANN401
                return found.potential_fn(unravel(u))

            self._value = jax.jit(jax.vmap(potential))
            self._both = jax.jit(jax.vmap(jax.value_and_grad(potential)))
            self._constrain = jax.jit(jax.vmap(lambda u: found.postprocess_fn(unravel(u))))
        self.names = tuple(
            name + (f"[{','.join(map(str, index))}]" if value.ndim else "")
            for name, value in sorted(start.items())
            for index in np.ndindex(value.shape)
        )

    def __call__(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        r"""Energies of points with shape :math:`(*, d)`, in the dtype and on the device of x."""
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (*, {self.dim}), got {tuple(x.shape)}")
        flat = x.reshape(-1, self.dim)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Differentiable.apply(flat, self).reshape(x.shape[:-1])
        return self._run(self._value, flat).to(x).reshape(x.shape[:-1])

    def constrain(self, x: Float[Tensor, "n dim"]) -> dict[str, Tensor]:
        """The model's variables at unconstrained points, deterministic ones included.

        Arguments:
            x: Points, with shape (n, dim).

        Returns:
            For each variable its values, with shape (n, ...).
        """
        if x.ndim != 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (n, {self.dim}), got {tuple(x.shape)}")
        found = self._run(self._constrain, x)
        return {name: value.to(x) for name, value in found.items()}

    def _run(self, function: Callable[..., Any], x: Tensor) -> Any:  # noqa: ANN401
        """A JAX function of rows, in double precision; compiled for a few numbers of rows only."""
        points = x.detach().to("cpu", torch.float64).numpy()
        rows = max(64, 1 << max(0, len(points) - 1).bit_length())
        padded = np.zeros((rows, self.dim))
        padded[: len(points)] = points
        with self._jax.enable_x64(True):
            found = function(padded)
        return self._jax.tree_util.tree_map(
            lambda part: torch.from_numpy(np.array(part)[: len(points)]), found
        )


def _check_sites(
    model: Callable[..., Any], arguments: tuple, options: dict[str, Any], seed: int
) -> None:
    """Refuse models whose energy is no function of continuous coordinates alone."""
    from numpyro import handlers
    from numpyro.infer import init_to_uniform

    # Values as NumPyro starts its chains with: an improper prior has no draws.
    started = handlers.substitute(handlers.seed(model, seed), substitute_fn=init_to_uniform)
    sites = handlers.trace(started).get_trace(*arguments, **options)
    for name, site in sites.items():
        if site["type"] == "param":
            raise ValueError(
                f"model must have no parameters to be optimised, got numpyro.param {name!r}; give "
                "it a prior with numpyro.sample, or pass its value as an argument"
            )
        if site["type"] == "plate":
            size, subsample = site["args"]
            if subsample is not None and subsample < size:
                raise ValueError(
                    "model must use all of its data in every call, got a plate "
                    f"{name!r} with subsample_size {subsample} of {size}"
                )
        latent = site["type"] == "sample" and not site["is_observed"]
        if latent and getattr(site["fn"].support, "is_discrete", False):
            raise ValueError(
                "model must have continuous latent variables alone, got the discrete one "
                f"{name!r}; sum over its values in the model"
            )


class _Differentiable(torch.autograd.Function):
    """The energy with JAX's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, energy: NumPyroEnergy) -> Tensor:  # noqa: ANN401
        value, gradient = energy._run(energy._both, x)
        ctx.save_for_backward(gradient.to(x))
        return value.to(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return upstream.unsqueeze(-1) * gradient, None


@checked
def from_numpyro(
    model: Callable[..., Any],
    *arguments: Any,  # noqa: ANN401
    seed: int = 0,
    **options: Any,  # noqa: ANN401
) -> NumPyroEnergy:
    r"""Energy of a NumPyro model given its data, in unconstrained coordinates.

    Values are computed by JAX in double precision, without changing its global settings, and
    carry the gradient with respect to the point.

    Arguments:
        model: A NumPyro model, with observed values.
        *arguments: Its arguments.
        seed: Of the trace that finds the model's variables. It does not change the energy.
        **options: Its keyword arguments.

    Returns:
        The energy, with ``dim``, ``names`` and ``constrain``.

    Raises:
        ImportError: Without NumPyro.
        ValueError: If the model is not callable or has no continuous latent variable.

    References:
        | Composable effects for flexible and accelerated probabilistic programming in NumPyro
        | (Phan et al., 2019)
        | https://arxiv.org/abs/1912.11554
    """
    return NumPyroEnergy(model, arguments, options, seed)
