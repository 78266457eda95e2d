r"""Perceptrons of one shape side by side, and the cheap form of Mish.

They are the networks of the agents: twin critics are one network with two members. Inputs come in
pieces, because many rows share a piece: the 64 candidate actions of one state meet the first
layer's share of that state once. :func:`mish` is the nonlinearity, by one sigmoid instead of three
functions one in the other:

.. math:: \mathrm{mish}(x) = x \tanh \log(1 + e^x) = x\, \frac{1 - q^2}{1 + q^2}
          = \frac{2x}{1 + q^2} - x, \qquad q = \frac{1}{1 + e^x} .

With :math:`y = -x` at hand, which a matrix product gives for free, that is
:math:`y - 2y / (1 + \mathrm{sigmoid}(y)^2)`: four passes over the memory.

On a CPU the products of single precision, and those of their gradients, go to oneDNN. PyTorch
itself sends them to MKL, which leaves half of a processor's vector width unused on some makes.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.checked import checked

__all__ = ["Activation", "EnsembleMLP", "mish"]

Activation = Literal["mish", "relu"]


def _find_linear() -> Any:  # noqa: ANN401
    """The linear layer of oneDNN that torch.compile uses, where there is one and it is right."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        x, weight, bias = torch.eye(3), torch.arange(6.0).view(2, 3), torch.ones(2)
        right = torch.equal(operator(x, weight, bias, "none", [], ""), weight.T + 1)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator if right else None


_LINEAR = _find_linear()
_CHUNK = 2048  # rows


@checked
class EnsembleMLP(nn.Module):
    r"""Perceptrons of one shape side by side.

    Arguments:
        inputs: Lengths of the pieces of an input.
        outputs: Length of an output.
        members: Number of perceptrons; they differ in their initial weights.
        width: Units of a hidden layer.
        depth: Number of hidden layers, at least 1.
        layer_norm: Whether what enters each nonlinearity is first brought to mean 0 and variance
            1 over the units, then scaled and shifted by learned vectors.
        activation: The nonlinearity of hidden layers, ``"mish"`` or ``"relu"``.
        generator: Source of the initial weights, on the CPU.

    Raises:
        ValueError: If a size is out of range, or the activation none of these.

    Attributes:
        plain: Whether calls keep to operations that ``torch.vmap`` knows, as they do on a GPU; on
            a CPU they are slower. False at first.

    Note:
        Weights start from a normal law of standard deviation :math:`1 / \sqrt{\text{inputs}}`, cut
        at twice that, and biases at 0, as in the code published with the paper; a layer's weight
        has shape (members, inputs, outputs).

    Example:
        >>> critics = EnsembleMLP([17, 6], 1, members=2, width=32)
        >>> observation, candidates = torch.randn(5, 1, 17), torch.randn(5, 64, 6)
        >>> critics(observation, candidates).shape
        torch.Size([2, 5, 64, 1])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: int,
        *,
        members: int = 1,
        width: int = 256,
        depth: int = 3,
        layer_norm: bool = False,
        activation: Activation = "mish",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {get_args(Activation)}, got {activation!r}"
            )
        given = {"outputs": outputs, "members": members, "width": width, "depth": depth}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not inputs or min(inputs) < 0 or sum(inputs) < 1:
            raise ValueError(f"inputs must be lengths of at least 0, not all 0, got {inputs}")
        self.inputs, self.outputs, self.members = tuple(inputs), outputs, members
        self.activation = activation
        sizes = [sum(inputs), *[width] * depth, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in itertools.pairwise(sizes):
            weight, std = torch.empty(members, before, after), 1 / math.sqrt(before)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, after)))
        self.gains, self.shifts = nn.ParameterList(), nn.ParameterList()
        for _ in range(depth if layer_norm else 0):
            self.gains.append(nn.Parameter(torch.ones(members, 1, width)))
            self.shifts.append(nn.Parameter(torch.zeros(members, 1, width)))
        self._scratch: Tensor | None = None
        self.plain = False

    def forward(self, *pieces: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""The outputs of all members.

        Arguments:
            pieces: The pieces of the inputs, each :math:`(*, n_i)`, whose batch shapes broadcast.
                What a row shares with others is multiplied once where its batch axis has size 1.

        Returns:
            The outputs, (members, \*, outputs).

        Raises:
            ValueError: If the pieces are not those of ``inputs``.
        """
        given = tuple(piece.shape[-1] for piece in pieces)
        if given != self.inputs:
            raise ValueError(f"pieces must have lengths {self.inputs}, got {given}")
        batch = _batch(pieces)
        rows = math.prod(batch)
        if (
            rows * self.members > _CHUNK
            and batch[0] > 1
            and not torch.is_grad_enabled()
            and pieces[0].device.type == "cpu"
            and not self.plain
        ):
            # What one layer writes the next one finds in the cache.
            size = max(1, _CHUNK * batch[0] // (rows * self.members))
            parts = zip(*(_split(piece, len(batch), size) for piece in pieces), strict=False)
            return torch.cat([self._forward(part, _batch(part)) for part in parts], 1)
        return self._forward(pieces, batch)

    def _forward(self, pieces: Sequence[Tensor], batch: torch.Size) -> Tensor:
        if all(piece.shape == pieces[0].shape[:-1] + piece.shape[-1:] for piece in pieces):
            x = torch.cat(list(pieces), -1)
            flat = x.reshape(1, -1, x.shape[-1]).expand(self.members, -1, -1)
            y = self._affine(flat, self.weights[0], self.biases[0], -1)
            return self.rest(y.view(self.members, *x.shape[:-1], -1))
        # The members' axis stands before the batch: missing axes are written out.
        missing = [len(batch) + 1 - piece.ndim for piece in pieces]
        pieces = [
            piece.reshape(*[1] * n, *piece.shape) for n, piece in zip(missing, pieces, strict=True)
        ]
        order = sorted(range(len(pieces)), key=lambda i: pieces[i].shape[:-1].numel())
        negated = -self.first(order[0], pieces[order[0]], bias=True)
        for i in order[1:]:
            share = self.first(i, pieces[i])
            whole = share.shape[1:-1] == batch and not (torch.is_grad_enabled() or self.plain)
            negated = torch.sub(negated, share, out=share) if whole else negated - share
        return self.rest(negated)

    def first(
        self, index: int, piece: Float[Tensor, "*batch n"], *, bias: bool = False
    ) -> Float[Tensor, "members *batch width"]:
        """The share of one piece in what the first hidden layer sees.

        Arguments:
            index: Which piece.
            piece: Its values, with any batch shape.
            bias: Whether to add the layer's bias.
        """
        begin = sum(self.inputs[:index])
        weight = self.weights[0][:, begin : begin + self.inputs[index]]
        batch, flat = piece.shape[:-1], piece.reshape(1, -1, piece.shape[-1])
        flat = flat.expand(self.members, -1, -1)
        y = torch.baddbmm(self.biases[0], flat, weight) if bias else torch.bmm(flat, weight)
        return y.view(self.members, *batch, -1)

    def prepared(self) -> "list[list[_Layer]]":
        """The layers after the first of every member, ready for many calls of rest."""
        layers = list(zip(self.weights, self.biases, strict=True))[1:]
        return [
            [
                _Layer(weight[i], bias[i, 0], -1 if weight is not layers[-1][0] else 1)
                for weight, bias in layers
            ]
            for i in range(self.members)
        ]

    def rest(
        self,
        negated: Float[Tensor, "members *batch width"],
        prepared: "list[list[_Layer]] | None" = None,
    ) -> Float[Tensor, "..."]:
        """The outputs, from minus the first hidden layer's input, which may be overwritten.

        Arguments:
            negated: Minus what the first layer's activation is to see.
            prepared: What :meth:`prepared` returned since the weights last changed, for calls
                without gradients; made anew if None.
        """
        batch = negated.shape[1:-1]
        h = negated.reshape(self.members, -1, negated.shape[-1])
        if torch.is_grad_enabled() or h.is_cuda or self.plain:
            h = self._activated(self._normalised(0, h))
            hidden = zip(list(self.weights)[1:-1], list(self.biases)[1:-1], strict=True)
            for number, (weight, bias) in enumerate(hidden, 1):
                h = self._affine(h, weight, bias, -1)
                h = self._activated(self._normalised(number, h))
            y = self._affine(h, self.weights[-1], self.biases[-1], 1)
        else:
            scratch, found = self._spare(h[0]), []
            for i, (*layers, last) in enumerate(self.prepared() if prepared is None else prepared):
                x = self._activated(self._normalised(0, h[i].contiguous(), i), scratch)
                for number, layer in enumerate(layers, 1):
                    x = self._activated(self._normalised(number, layer(x), i), scratch)
                found.append(last(x))
            y = torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)
        return y.view(self.members, *batch, self.outputs)

    def _affine(self, h: Tensor, weight: Tensor, bias: Tensor, sign: int) -> Tensor:
        """The map h -> sign (h W + b) of all members, with gradients."""
        if not self.plain and _is_fast(weight):
            return _Affine.apply(h, weight, bias, sign)
        return torch.baddbmm(bias, h, weight, beta=sign, alpha=sign)

    def _activated(self, negated: Tensor, scratch: Tensor | None = None) -> Tensor:
        """The nonlinearity of minus what is given, which is overwritten without gradients."""
        if self.activation == "relu":
            return _relu_of_minus(negated)
        return nn.functional.mish(-negated) if self.plain else _mish_of_minus(negated, scratch)

    def _normalised(self, number: int, negated: Tensor, member: int | None = None) -> Tensor:
        """Layer normalisation of minus a layer's values, of all members or of one."""
        if not self.gains:
            return negated
        gain, shift = self.gains[number], self.shifts[number]
        units = negated.shape[-1:]
        if member is not None:
            return nn.functional.layer_norm(negated, units, gain[member, 0], -shift[member, 0])
        return torch.addcmul(-shift, nn.functional.layer_norm(negated, units), gain)

    def _spare(self, like: Tensor) -> Tensor:
        """Memory for one layer's values: fresh pages cost more than what is written to them."""
        found = self._scratch
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            found = self._scratch = torch.empty_like(like)
        return found


class _Layer:
    """The map h -> sign (h W + b) of one member without gradients, ready for many calls."""

    def __init__(self, weight: Tensor, bias: Tensor, sign: int) -> None:
        self.fast = _is_fast(weight)
        self.weight, self.bias, self.sign = weight, bias, sign
        if self.fast:
            self.weight, self.bias = (sign * weight).T.contiguous(), sign * bias

    def __call__(self, h: Tensor) -> Tensor:
        if self.fast:
            return _LINEAR(h, self.weight, self.bias, "none", [], "")
        return torch.addmm(self.bias, h, self.weight, beta=self.sign, alpha=self.sign)


def _is_fast(x: Tensor) -> bool:
    return _LINEAR is not None and x.device.type == "cpu" and x.dtype == torch.float32


class _Affine(torch.autograd.Function):
    """Three products of each member by oneDNN: forwards, and for the gradients of h and W."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, sign: int) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(h, weight)
        ctx.sign = sign
        return _products(h, (sign * weight).mT, sign * bias[:, 0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        h, weight = ctx.saved_tensors
        signed = gradient.neg() if ctx.sign < 0 else gradient
        to_h = _products(signed, weight) if ctx.needs_input_grad[0] else None
        to_weight = _products(h.mT, signed.mT) if ctx.needs_input_grad[1] else None
        to_bias = signed.sum(1, keepdim=True) if ctx.needs_input_grad[2] else None
        return to_h, to_weight, to_bias, None


def _products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x_i weight_i^T + bias_i for each member i."""
    biases = [None] * len(x) if bias is None else bias
    parts = [
        _LINEAR(each, w, b, "none", [], "") for each, w, b in zip(x, weight, biases, strict=True)
    ]
    return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)


def _batch(pieces: Sequence[Tensor]) -> torch.Size:
    """The batch shape that all pieces make together."""
    first, *others = (piece.shape[:-1] for piece in pieces)
    if all(shape == first for shape in others):  # mostly; and much faster
        return first
    return torch.broadcast_shapes(first, *others)


def _split(piece: Tensor, batch_dims: int, size: int) -> Iterable[Tensor]:
    """A piece cut along the first axis of the whole batch, where it has that axis."""
    if piece.ndim - 1 == batch_dims and piece.shape[0] > 1:
        return piece.split(size)
    return itertools.repeat(piece)


@checked
def mish(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""The activation :math:`x \tanh \log (1 + e^x)`.

    Arguments:
        x: Values of any shape.

    Returns:
        The activation, with the shape of x; its gradient too costs one sigmoid.

    References:
        | Mish: a self regularized non-monotonic activation function (Misra, 2020)
        | https://arxiv.org/abs/1908.08681

    Example:
        >>> mish(torch.tensor([-1.0, 1.0]))
        tensor([-0.3034,  0.8651])
    """
    return _mish_of_minus(-x)


def _mish_of_minus(y: Tensor, scratch: Tensor | None = None) -> Tensor:
    """mish(-y). Without gradients y is overwritten."""
    if y.is_cuda:
        return nn.functional.mish(-y)
    if torch.is_grad_enabled() and y.requires_grad:
        return _MishOfMinus.apply(y)
    q = torch.sigmoid(y) if scratch is None else torch.sigmoid(y, out=scratch)
    torch.addcmul(q.new_ones(()), q, q, out=q)
    return torch.addcdiv(y, y, q, value=-2.0, out=y)


def _relu_of_minus(y: Tensor) -> Tensor:
    """relu(-y)."""
    return torch.clamp_max(y, 0.0).neg()


class _MishOfMinus(torch.autograd.Function):
    """Keeps the slope, so that a step back is one product."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:  # noqa: ANN401
        q = torch.sigmoid(y)
        square = q.square()
        u = square + 1
        # d/dy (y - 2y/u) = 1 - 2/u + 2y u'/u^2 with u' = 2 q^2 (1 - q)
        bend = torch.addcmul(square, square, q, value=-1.0).mul_(y)
        ctx.save_for_backward(torch.addcdiv(square.sub_(1.0), bend, u, value=4.0).div_(u))
        return torch.addcdiv(y, y, u, value=-2.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        (slope,) = ctx.saved_tensors
        return gradient * slope
