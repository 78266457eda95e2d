r"""Agents that differ in their seeds alone, updated as one batched computation.

Parameters, slow copies, Adam's moments and what an agent tunes are stacked along a first axis, and
each part of an update is mapped over it by :func:`torch.vmap`: S products of matrices become one
batched product, and on a GPU one captured graph holds the updates of all. Losses are summed over
the agents, so that each gets the gradient of its own.

**Nothing is shared but the computation.** The agents stay whole: their tensors become views of the
stack, so that each can act, be evaluated and be saved at any time, as if it were alone. Every
random number is drawn from its own agent's generator, in the order of a single run: agent i goes
the way that it would go alone, up to rounding.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rl.base import BaseAgent, set_lr
from rl.graphs import Captured
from rl.off_policy import Alone, OffPolicyAgent
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.ensemble import EnsembleMLP

__all__ = ["Lockstep"]


class Lockstep(Alone):
    """Agents of one configuration that are updated together.

    Arguments:
        agents: The agents, with as many updates each.

    Raises:
        ValueError: If they differ in more than their seeds, or their kind is none that can be
            updated together (``stackable``).

    Example:
        >>> from rl import DPMD, DPMDConfig
        >>> config = DPMDConfig(width=16, depth=1)
        >>> agents = [DPMD(3, 1, config, seed=seed, device="cpu") for seed in range(4)]
        >>> observations = np.zeros((4, 1, 3), np.float32)
        >>> Lockstep(agents).act(observations).shape
        (4, 1, 1)
    """

    def __init__(self, agents: Sequence[BaseAgent]) -> None:
        if not agents:
            raise ValueError("agents must be at least one, got none")
        first = agents[0]
        if not first.stackable:
            raise ValueError(f"agents must be of a stackable kind, got {first.name}")
        for agent in agents[1:]:
            if type(agent) is not type(first):
                raise ValueError(f"agents must be of one kind, got {first.name} and {agent.name}")
            for name in ("config", "observation_dim", "action_dim", "device", "updates"):
                ours, theirs = getattr(first, name), getattr(agent, name)
                if ours != theirs:
                    raise ValueError(f"agents must have one {name}, got {ours} and {theirs}")
        self.agents: list[Any] = list(agents)
        for agent in agents:
            agent.release()  # of graphs that know the tensors by their addresses
        self._common: Any = type(first)(
            first.observation_dim, first.action_dim, first.config, device=first.device
        )
        self._body = _Body(self._common._modules())
        for module in self._body.modules():
            if isinstance(module, EnsembleMLP):
                module.plain = True
        bodies = [dict(_Body(agent._modules()).named_parameters()) for agent in agents]
        self._parameters = {name: _stacked([b[name] for b in bodies]) for name in bodies[0]}
        moments = [dict(agent.moments.named_buffers("moments")) for agent in agents]
        self._moments = {name: _stacked([m[name] for m in moments]) for name in moments[0]}
        names = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
        self._tuned = {name: _stacked([vars(agent)[name] for agent in agents]) for name in names}
        common = self._common
        common.critic_optimiser = self._joined([agent.critic_optimiser for agent in agents])
        common.policy_optimiser = self._joined([agent.policy_optimiser for agent in agents])
        self._runs = torch.arange(len(agents), device=first.device)
        self._captured: dict[tuple[Any, ...], Captured] = {}
        self._inputs: dict[int, Tensor] = {}
        self._replays: tuple[ReplayBuffer, ...] | None = None

    def _joined(self, optimisers: Sequence[torch.optim.Optimizer]) -> torch.optim.Adam:
        """One optimiser of the stacked parameters, whose moments the agents' own ones look at."""
        members = [optimiser.param_groups[0]["params"] for optimiser in optimisers]
        lr = float(optimisers[0].param_groups[0]["lr"])
        stacks = [self._stack_of(parameter) for parameter in members[0]]
        joined = self._common.adam(stacks, lr)
        for stack, *own in zip(stacks, *members, strict=True):
            pairs = list(zip(optimisers, own, strict=True))
            for optimiser, parameter in pairs:
                if not optimiser.state.get(parameter):
                    optimiser.state[parameter] = {
                        "step": torch.zeros((), device=stack.device if stack.is_cuda else "cpu"),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            kept = [optimiser.state[parameter] for optimiser, parameter in pairs]
            joined.state[stack] = {
                "step": kept[0]["step"],
                **{name: _stacked([k[name] for k in kept]) for name in ("exp_avg", "exp_avg_sq")},
            }
            for state in kept:
                state["step"] = kept[0]["step"]  # counted once for all
        return joined

    def _stack_of(self, parameter: Tensor) -> Tensor:
        """The stack whose first part is a parameter of the first agent."""
        place = parameter.data_ptr()
        return next(s for s in self._parameters.values() if s.data_ptr() == place)

    # ------------------------------------------------------------------ acting and updating

    @torch.no_grad()
    def act(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Exploring actions of every agent; see :meth:`rl.base.BaseAgent.act`.

        Arguments:
            observations: Raw observations, (agents, n, observation_dim).

        Returns:
            The actions, (agents, n, action_dim).
        """
        if getattr(self._common.config, "persistence", 0) > 0:  # their noise has a memory
            pairs = zip(self.agents, observations, strict=True)
            return np.stack([agent.act(observation) for agent, observation in pairs])
        n = observations.shape[1]
        if n not in self._inputs:
            self._inputs[n] = torch.empty(observations.shape, device=self._common.device)
        key = ("act", n)
        if key not in self._captured:
            generators = [agent.acting_generator for agent in self.agents]
            self._captured[key] = Captured(
                lambda: self.call(self._explore, self._inputs[n]), self._common.device, generators
            )
        self._inputs[n].copy_(torch.from_numpy(observations))
        return self._captured[key]().cpu().numpy()

    def _explore(self, observation: Tensor) -> Tensor:
        common = self._common
        return common.explore(common._standardised(observation))

    def update(self, replays: Sequence[ReplayBuffer]) -> list[dict[str, Tensor]]:
        """One update of every agent; see :meth:`rl.off_policy.OffPolicyAgent.update`.

        Arguments:
            replays: The replay of each.

        Returns:
            The numbers of each.
        """
        if self._replays is None or any(map(operator.is_not, replays, self._replays)):
            self._captured.clear()  # graphs know what they read by its address
            self._replays = tuple(replays)
        pairs = zip(self.agents, replays, strict=True)
        (flags,) = {agent.begin_update(replay) for agent, replay in pairs}
        set_lr(self._common.policy_optimiser, self.agents[0].policy_lr)
        if flags not in self._captured:
            generators = [agent.generator for agent in self.agents]
            self._captured[flags] = Captured(
                partial(self._update, replays, *flags), self._common.device, generators
            )
        for agent in self.agents:
            agent.updates += 1
        found = self._captured[flags]()
        return [
            {**{name: x[i] for name, x in found.items()}, **agent.after_update(replay)}
            for i, (agent, replay) in enumerate(zip(self.agents, replays, strict=True))
        ]

    def _update(
        self, replays: Sequence[ReplayBuffer], with_policy: bool, with_target: bool
    ) -> dict[str, Tensor]:
        size = self._common.config.batch_size
        drawn = [
            replay.sample(size, generator=agent.generator)
            for replay, agent in zip(replays, self.agents, strict=True)
        ]
        batch = Batch(*(torch.stack(rows) for rows in zip(*drawn, strict=True)))
        return self._common.learn(batch, with_policy, with_target, self)

    # ------------------------------------------------------------------ what an update asks for

    def call(self, part: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
        """A part of an update, of all agents at once: results have an axis more."""

        def one(
            run: Tensor,
            tensors: dict[str, Tensor],
            tuned: dict[str, Tensor],
            *given: Any,  # noqa: ANN401
        ) -> tuple[Any, dict[str, Tensor]]:
            vars(self._common).update(tuned)
            with _Streams(self._common, self.agents, run):
                result = torch.func.functional_call(self._body, tensors, (part, *given))
            return result, {name: vars(self._common)[name] for name in tuned}

        tensors = {**self._parameters, **self._moments}
        over = torch.vmap(one, randomness="same")
        result, after = over(self._runs, tensors, self._tuned, *arguments)
        with torch.no_grad():
            for name, value in after.items():
                self._tuned[name].copy_(value)
        return result

    def each(
        self, agent: OffPolicyAgent, method: str, *arguments: Tensor
    ) -> tuple[Tensor, ...] | None:
        """What every agent does with what it keeps to itself, of its part of the arguments."""
        found = [
            getattr(own, method)(*(x[i] for x in arguments)) for i, own in enumerate(self.agents)
        ]
        if found[0] is None:
            return None
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """The stacked parameters of one of the networks."""
        name = next(name for name, each in self._body.named_children() if each is module)
        return [self._parameters[f"{name}.{own}"] for own, _ in module.named_parameters()]

    def clip(self, parameters: list[Tensor], limit: float) -> None:
        """Shorten the gradient of each agent."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients])
        factor = (limit / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


class _Body(nn.Module):
    """The networks of an agent as one module, which runs whatever it is given."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, part: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
        return part(*arguments)


class _Streams(TorchFunctionMode):
    """Within a mapped function: random numbers of each agent come from its own generators."""

    def __init__(
        self, common: OffPolicyAgent, agents: Sequence[OffPolicyAgent], run: Tensor
    ) -> None:
        super().__init__()
        self.run = run
        self.own = {
            id(common.generator): [agent.generator for agent in agents],
            id(common.acting_generator): [agent.acting_generator for agent in agents],
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        generators = self.own.get(id(kwargs.get("generator")))
        if generators is None:
            return func(*args, **kwargs)
        drawn = [func(*args, **{**kwargs, "generator": each}) for each in generators]
        return torch.stack(drawn)[self.run]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors along a new first axis, of which each becomes its part."""
    stack = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, stack, strict=True):
        tensor.data = part
    return stack.requires_grad_(tensors[0].requires_grad)
