"""Functions on fixed tensors, replayed as one CUDA graph.

A small network's update is hundreds of kernels of a few microseconds each, and launching them
takes longer than running them. A graph launches all at once. What it may not do is decide
anything on the host, so the functions captured here read their inputs from tensors that stay in
place, draw from registered generators, and return tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Captured"]


class Captured:
    """A function without arguments: plain on a CPU, a replayed graph on a GPU.

    The first calls on a GPU run as usual, on a stream of their own, so that what allocates lazily
    does so; then one is captured. Every call does its work exactly once.

    Arguments:
        function: What to run. It returns tensors, which later calls overwrite on a GPU.
        device: Where it runs.
        generators: Generators that it draws from.
        warmup: Number of plain calls before the capture.

    Example:
        >>> total = torch.zeros(())
        >>> step = Captured(lambda: total.add_(1), torch.device("cpu"))
        >>> step(), step()
        (tensor(2.), tensor(2.))
    """

    def __init__(
        self,
        function: Callable[[], Any],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        warmup: int = 3,
    ) -> None:
        self.function, self.device, self.generators = function, device, tuple(generators)
        self._left = warmup
        self._graph: Any = None
        self._result: Any = None

    def __call__(self) -> Any:  # noqa: ANN401
        """Run the function once."""
        if self.device.type != "cuda":
            return self.function()
        if self._left > 0:
            self._left -= 1
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                result = self.function()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            return result
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                self._result = self.function()
            self._graph = graph
        self._graph.replay()
        return self._result
