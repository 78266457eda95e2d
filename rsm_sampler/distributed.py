"""One training in several processes: ``torchrun --nproc-per-node 4 train.py``.

A script that trains needs no change. Every process makes the same random numbers from the same
seed, and so the same noisy points and candidates; it evaluates the energy on its share of them
and sends the values round, puts its share through the network, and the gradients are added up
(:class:`~torch.nn.parallel.DistributedDataParallel`). All processes then hold the same weights:
the result is that of one process, but for the order in which numbers are added.

Only the leader (rank 0) writes checkpoints, logs and the progress bar. An exception in the energy
of one process ends all of them.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rsm_sampler.target.calls import Calls, with_gradient

__all__ = ["Team"]


class Team:
    """The processes that train together; usually one.

    Arguments:
        device: Where this process works, ``"auto"`` for a GPU of its own where there is one.

    Raises:
        ValueError: If the device is not available.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        device: Where it works.
    """

    def __init__(self, device: str | torch.device = "auto") -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        local = int(os.environ.get("LOCAL_RANK", "0"))
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        if launched and gpus and str(device) == "cuda":  # each process has one of its own
            device = f"cuda:{local % gpus}"
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device must be available on this machine, got {device!r}"
            ) from error
        self.rank, self.size = 0, 1
        if launched and distributed.is_available():
            if not distributed.is_initialized():
                distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """The rows, of n, that this process works on."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def most(self, code: int) -> int:
        """The largest of the processes' numbers, on all of them."""
        if self.size == 1:
            return code
        found = torch.tensor([code], device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def gather(self, part: Tensor, n: int) -> Tensor:
        """All n rows, from every process's share of them; without gradients."""
        longest = -(-n // self.size)
        padded = part.detach().new_zeros((longest, *part.shape[1:]))
        padded[: len(part)] = part.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(parts, padded.contiguous())
        ends = [n * i // self.size for i in range(self.size + 1)]
        return torch.cat([p[: ends[i + 1] - ends[i]] for i, p in enumerate(parts)])

    def energy(
        self, energy: Callable[..., Tensor], call_timeout: float | None = None
    ) -> Callable[..., Tensor]:
        """The energy, each process evaluating its share of the points.

        Arguments:
            energy: The energy.
            call_timeout: Seconds of one call of it, if there are several processes: then nobody
                else can bound it.
        """
        if self.size == 1 or not callable(energy):
            return energy
        return _SharedEnergy(energy, self, call_timeout)

    def denoiser(self, denoiser: nn.Module) -> Callable[..., Tensor]:
        """The denoiser, each process working on its share of the rows.

        The gradient of a loss of its outputs is that of the loss divided by :attr:`size`.
        """
        return denoiser if self.size == 1 else _SharedDenoiser(denoiser, self)


class _SharedEnergy:
    batched = True  # how many points a process evaluates at once is its own affair

    def __init__(
        self, energy: Callable[..., Tensor], team: Team, call_timeout: float | None
    ) -> None:
        self.energy, self.team, self.call_timeout = energy, team, call_timeout
        self.dim: Any = getattr(energy, "dim", None)
        self._calls: dict[torch.dtype, Calls] = {}

    def agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop."""
        return bool(self.team.most(int(stop)))

    def __call__(self, x: Tensor, *context: Tensor) -> Tensor:
        own = self.team.share(len(x))
        graph = torch.is_grad_enabled() and x.requires_grad
        value, gradient, problem = x.new_empty(0), None, None
        if x.dtype not in self._calls:
            self._calls[x.dtype] = Calls(self.energy, x.dtype, self.call_timeout)
        try:
            value, gradient, _ = self._calls[x.dtype](
                x[own], *(c[own] for c in context), gradient=graph
            )
        except Exception as error:
            problem = error
        if self.team.most(int(problem is not None)):
            raise problem or RuntimeError("the energy failed in another process")
        value = self.team.gather(value, len(x))
        if not graph or self.team.most(int(gradient is None)):
            return value
        assert gradient is not None
        return with_gradient(x, value, self.team.gather(gradient, len(x)))


class _SharedDenoiser:
    def __init__(self, denoiser: nn.Module, team: Team) -> None:
        self.team, self.sigma_data = team, denoiser.sigma_data
        self.parallel = DistributedDataParallel(denoiser, broadcast_buffers=False)

    def __call__(self, x_t: Tensor, sigma: Tensor, context: Tensor | None = None) -> Tensor:
        n = len(x_t)
        own = self.team.share(n)
        sigma = sigma.expand(x_t.shape[:-1])
        rest = () if context is None else (context[own],)
        mine = self.parallel(x_t[own], sigma[own], *rest)
        everyone = self.team.gather(mine, n)
        return torch.cat([everyone[: own.start], mine, everyone[own.stop :]])
