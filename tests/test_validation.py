"""The checks of arguments: what they take, what they refuse, and in which words."""

import inspect

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from energies import GaussianMixture
from rsm_sampler import validation
from rsm_sampler.checked import checked
from rsm_sampler.metrics import wasserstein2

pytestmark = pytest.mark.bad_input


@checked(least={"n": 1}, above={"scale": 0}, finite=("y",))
def joined(
    x: Float[Tensor, "n dim"],
    y: Float[Tensor, " dim"] | float = 0.0,
    *,
    count: int = 1,
    scale: float = 1.0,
    loud: bool = False,
) -> Tensor:
    """Doubled."""
    return scale * x + y


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: validation.integer("n", 1.5), TypeError, "n must be an integer, got 1.5"),
        (lambda: validation.integer("n", True), TypeError, "n must be an integer, got True"),
        (lambda: validation.integer("n", np.int64(0), least=1), ValueError, "at least 1, got 0"),
        (lambda: validation.integer("n", 10**30), ValueError, "n must be at most 9223372036854"),
        (lambda: validation.size("n", 10**15), ValueError, "what memory holds, got 1000000000"),
        (lambda: validation.number("s", 1j), TypeError, "s must be a number, got 1j"),
        (lambda: validation.number("s", "1"), TypeError, "s must be a number, got '1'"),
        (lambda: validation.number("s", np.inf), ValueError, "s must be a finite number, got inf"),
        (lambda: validation.number("s", np.nan, above=0), ValueError, "be positive, got nan"),
        (lambda: validation.flag("f", 1), TypeError, "f must be True or False, got 1"),
        (lambda: validation.choice("c", 1, ("a", "b", "c")), ValueError, "one of .*, got 1"),
        (lambda: validation.path("p", ""), ValueError, "p must be the path of a file"),
        (lambda: validation.device("d", "gpu7"), ValueError, "d must be available .* 'gpu7'"),
        (lambda: validation.tensor("x", "a"), TypeError, "x must be a tensor, .* got 'a'"),
        (lambda: validation.tensor("x", [[1], [1, 2]]), ValueError, "rows have one length"),
        (lambda: validation.tensor("x", [1j]), ValueError, "x must have real numbers"),
        (lambda: joined([1.0]), ValueError, r"x must have shape \(n, dim\), got \(1,\)"),
        (lambda: joined([[1.0]], [1.0, 2.0]), ValueError, r"y must have shape \(1,\), got"),
        (lambda: joined([[1.0]], [np.nan]), ValueError, "y must be finite, got nan"),
        (lambda: joined([[1.0]], "a"), TypeError, "y must be a tensor .* or a number, got 'a'"),
        (lambda: joined([[1.0]], count=2.0), TypeError, "count must be an integer, got 2.0"),
        (lambda: joined([[1.0]], scale=0), ValueError, "scale must be positive, got 0"),
        (lambda: joined([[1.0]], loud=None), TypeError, "loud must be True or False, got None"),
    ],
)
def test_messages_name_argument_rule_and_value(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_arrays_and_lists_are_taken_as_tensors():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(joined(x.numpy()), x)
    assert torch.equal(joined(x.tolist()), x)
    assert torch.equal(joined([[1, 2], [3, 4]]), x)
    assert joined(x.numpy().astype(np.float64)).dtype is torch.float64
    # beside a tensor, in its precision
    assert joined(x, np.zeros(2)).dtype is torch.float32
    assert wasserstein2(x, x.numpy().astype(np.float64)) == 0
    target = GaussianMixture(np.zeros((1, 2)), 1.0, weights=[1.0])
    assert torch.equal(target(x.tolist()), target(x))


def test_numbers_of_numpy_are_numbers():
    assert type(validation.integer("n", np.int32(3))) is int
    assert type(validation.number("s", np.float32(0.5))) is float


def test_signatures_stay_and_read_only_arrays_are_copied():
    assert list(inspect.signature(joined).parameters) == ["x", "y", "count", "scale", "loud"]
    assert joined.__doc__ == "Doubled."
    array = np.ones((1, 2))
    array.flags.writeable = False
    assert validation.tensor("x", array).tolist() == [[1.0, 1.0]]


def test_axes_are_those_of_the_object():
    target = GaussianMixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 2\), got \(4, 3\)"):
        target.log_prob(torch.zeros(4, 3))
