r"""Where the contexts of a conditional energy come from.

An amortised sampler is asked about contexts that it has not seen, and asked again about rare ones:
of :math:`10^3` contexts a training run sees none of the outermost :math:`10^{-4}`, where a network
can only extrapolate. Contexts cost no energy evaluation, so that many may be drawn and those kept
that leave no gaps.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Contexts"]

_POOL = 32  # draws from which one context is chosen


class Contexts:
    """The user's law of contexts, checked.

    Arguments:
        draw: Draws contexts, ``(n, generator) -> (n, dim)``.
        dim: Length of a context.
        device: Where they are wanted.
    """

    def __init__(self, draw: Callable[..., Tensor], dim: int, device: torch.device) -> None:
        self.draw, self.dim, self.device = draw, dim, device

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Contexts as they come.

        Arguments:
            n: How many.
            generator: Source of randomness, handed on.

        Raises:
            ValueError: If they do not have the shape (n, dim).
        """
        context = self.draw(n, generator)
        if not isinstance(context, Tensor) or context.shape != (n, self.dim):
            raise ValueError(
                f"context must return shape ({n}, {self.dim}), got "
                f"{tuple(context.shape) if isinstance(context, Tensor) else type(context)}"
            )
        return context.to(self.device)

    def scattered(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Contexts to train on: half of them as they come, half where those are far apart.

        The second half are chosen from 32 n draws, one after the other, each the one farthest from
        all before it, in units of standard deviations.

        Arguments:
            n: How many.
            generator: Source of randomness, handed on.
        """
        pool = self.sample(_POOL * n, generator)
        std = pool.std(0)
        places = pool / torch.where(std > 0, std, torch.ones_like(std))
        chosen = list(torch.arange(n - n // 2, device=pool.device).unbind())
        nearest = torch.cdist(places, places[: len(chosen)]).amin(-1)
        for _ in range(n // 2):
            chosen.append(nearest.argmax())
            nearest = torch.minimum(nearest, (places - places[chosen[-1]]).norm(dim=-1))
        return pool[torch.stack(chosen)]
