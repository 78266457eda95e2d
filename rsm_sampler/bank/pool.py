"""Points that exploration has evaluated, with the joint density of the laws behind them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.montecarlo.densities import Density, Joint
from rsm_sampler.montecarlo.weights import LogWeights

__all__ = ["Pool"]

_NEGLIGIBLE = 60.0  # nats below the largest weight


class Pool:
    r"""Evaluated draws of several laws, weighted jointly.

    .. math:: w_i = \frac{e^{-E(x_i)}}{\sum_t n_t q_t(x_i) / \sum_t n_t}

    The more laws are in the sum, the smaller is a weight. So laws are added to the sum of a point
    only while, without them, its weight is not negligible.

    Attributes:
        laws: The laws, in the order in which they were drawn from.
        counts: Draws of each.
        x: Points, (n, dim).
        energy: Their energies, (n).
    """

    def __init__(self) -> None:
        self.laws: list[Density] = []
        self.counts: list[int] = []
        self.x = torch.zeros(0, 1)
        self.energy = torch.zeros(0)
        self._log_sum = torch.zeros(0)  # log of sum_t n_t q_t, over the laws so far added
        self._added = torch.zeros(0, dtype=torch.long)  # how many of the laws these are

    def __len__(self) -> int:
        return len(self.x)

    def add(
        self, law: Density, x: Float[Tensor, "n dim"], energy: Float[Tensor, " n"]
    ) -> LogWeights:
        """Enter draws of a law with their energies.

        Arguments:
            law: The law.
            x: Its draws.
            energy: Their energies.

        Returns:
            Their own weights, by the density of this law alone.
        """
        own = law.log_prob(x)
        log_sum = own + math.log(len(x))
        for earlier, count in zip(self.laws, self.counts, strict=True):
            log_sum = torch.logaddexp(log_sum, earlier.log_prob(x) + math.log(count))
        self.laws.append(law)
        self.counts.append(len(x))
        added = torch.full((len(x),), len(self.laws), dtype=torch.long, device=x.device)
        if len(self) == 0:
            self.x, self.energy, self._log_sum, self._added = x, energy, log_sum, added
        else:
            self.x = torch.cat([self.x, x])
            self.energy = torch.cat([self.energy, energy])
            self._log_sum = torch.cat([self._log_sum, log_sum])
            self._added = torch.cat([self._added, added])
        return LogWeights(torch.where(energy < torch.inf, -energy - own, -torch.inf))

    def forget(self) -> None:
        """Forget the last law with its draws, before any weights are asked for with them."""
        first = len(self) - self.counts.pop()
        self.laws.pop()
        self.x, self.energy = self.x[:first], self.energy[:first]
        self._log_sum, self._added = self._log_sum[:first], self._added[:first]

    def trim(self, most: int) -> None:
        """Forget all but the last laws, with their draws.

        Arguments:
            most: Laws to keep.
        """
        gone = len(self.laws) - most
        if gone < 1:
            return
        first = sum(self.counts[:gone])
        kept = list(zip(self.laws[gone:], self.counts[gone:], strict=True))
        x, energy = self.x[first:], self.energy[first:]
        self.__init__()  # type: ignore[misc]
        for law, count in kept:
            self.add(law, x[:count], energy[:count])
            x, energy = x[count:], energy[count:]

    @property
    def weights(self) -> LogWeights:
        """The joint weights of all points."""
        while True:
            value = -self.energy - self._log_sum
            value = torch.where(self.energy < torch.inf, value, -torch.inf)
            late = (value > value.amax() - _NEGLIGIBLE) & (self._added < len(self.laws))
            index = late.nonzero()[:, 0]
            if len(index) == 0:
                return LogWeights(value + math.log(len(self)))
            for t in range(int(self._added[index].min()), len(self.laws)):
                at = index[self._added[index] == t]
                if len(at):
                    term = self.laws[t].log_prob(self.x[at]) + math.log(self.counts[t])
                    self._log_sum[at] = torch.logaddexp(self._log_sum[at], term)
                    self._added[at] = t + 1

    @property
    def law(self) -> Joint:
        """The joint law of all points."""
        return Joint(self.laws, self.counts)
