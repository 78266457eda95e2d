import copy
import math

import pytest
import torch

from rsm_sampler import ensemble as ensemble_module
from rsm_sampler.ensemble import EnsembleMLP, mish
from rsm_sampler.networks import MLP, shared_level
from tests.exact import NoReadBack

DOUBLE = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=DOUBLE, generator=rng(seed))


def network(dim=2, **kwargs):
    """A network whose last layer is not at its start, zero."""
    made = MLP(dim, **{"width": 16, "generator": rng()} | kwargs)
    torch.nn.init.normal_(made.output.weight, generator=rng(9))
    torch.nn.init.normal_(made.output.bias, generator=rng(10))
    return made


def weights(made):
    return torch.cat([value.flatten() for value in made.state_dict().values()])


def test_the_untrained_output_is_zero():
    x = torch.randn(5, 3, generator=rng())
    assert torch.equal(MLP(3, generator=rng())(x, torch.zeros(5)), torch.zeros(5, 3))


def test_initial_weights_have_the_usual_law():
    """Uniform within 1 / sqrt(inputs): bounds, and a standard deviation within 5 errors."""
    made = MLP(2, width=256, depth=2, generator=rng())
    for layer in [made.embedding, made.modulation, *made.layers]:
        reach = 1 / math.sqrt(layer.in_features)
        weight = layer.weight.detach().double()
        assert weight.abs().max() <= reach and layer.bias.abs().max() <= reach
        # The variance of u² on [-1, 1] is 4/45, its mean 1/3.
        error = math.sqrt(4 / 45 / weight.numel())
        assert abs((weight / reach).square().mean().item() - 1 / 3) <= 5 * error
    assert made.projection.std().item() == pytest.approx(2 * math.sqrt(2 / 3), rel=0.4)


@pytest.mark.parametrize("frequencies", [0, 8])
def test_the_generator_decides_the_weights(frequencies):
    def make(generator):
        return weights(MLP(2, width=8, frequencies=frequencies, generator=generator))

    before = torch.random.get_rng_state()
    generator = rng(3)
    first, second = make(generator), make(generator)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, make(rng(3))) and not torch.equal(first, second)
    # Without a generator the global one is used, as everywhere in PyTorch.
    assert not torch.equal(make(None), make(None))
    assert not torch.equal(before, torch.random.get_rng_state())
    torch.random.set_rng_state(before)


@pytest.mark.parametrize("context_dim", [None, 3])
def test_a_shared_level_gives_what_single_levels_give(context_dim):
    made = network(context_dim=context_dim).double()
    x = torch.randn(4, 5, 2, generator=rng(), dtype=DOUBLE)
    extra = () if context_dim is None else (torch.randn(4, 5, 3, generator=rng(), dtype=DOUBLE),)
    one = torch.full((), 0.7, dtype=DOUBLE)
    torch.testing.assert_close(
        made(x, one.expand(4, 5), *extra), made(x, one.repeat(4, 5), *extra)
    )
    rows = torch.randn(4, 1, generator=rng(), dtype=DOUBLE)
    torch.testing.assert_close(
        made(x, rows.expand(4, 5), *extra), made(x, rows.repeat(1, 5), *extra)
    )


def test_shared_levels_are_found_without_looking_at_values():
    one = torch.tensor(2.0)
    assert shared_level(one.expand(3, 4)).shape == (1, 1)
    assert shared_level(torch.ones(3, 1).expand(3, 4)).shape == (3, 1)
    assert shared_level(torch.ones(3, 4)).shape == (3, 4)
    assert shared_level(one).shape == () and shared_level(one.expand(0)).shape == (0,)
    with NoReadBack():
        network()(torch.zeros(3, 2), one.expand(3))


def test_level_context_and_point_all_matter():
    made = network(context_dim=1)
    x, level, context = torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 1)
    base = made(x, level, context)
    for other in [(x + 1, level, context), (x, level + 1, context), (x, level, context + 1)]:
        assert not torch.allclose(made(*other), base)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("frequencies", [0, 8])
def test_rows_are_independent(depth, frequencies):
    made = network(depth=depth, frequencies=frequencies).double()
    x = torch.randn(6, 2, generator=rng(), dtype=DOUBLE)
    level = torch.randn(6, generator=rng(1), dtype=DOUBLE)
    together = made(x, level)
    torch.testing.assert_close(made(x.view(2, 3, 2), level.view(2, 3)).view(6, 2), together)
    torch.testing.assert_close(made(x[3], level[3]), together[3])
    assert made(x[:0], level[:0]).shape == (0, 2)


def test_the_state_makes_the_same_network():
    made, other = network(), MLP(2, width=16, generator=rng(5))
    other.load_state_dict(made.state_dict())
    x = torch.randn(5, 2, generator=rng())
    assert torch.equal(made(x, torch.zeros(5)), other(x, torch.zeros(5)))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(0), "dim must be at least 1, got 0"),
        (lambda: MLP(2, width=0), "width must be at least 1, got 0"),
        (lambda: MLP(2, depth=0), "depth must be at least 1, got 0"),
        (lambda: MLP(2, frequencies=-1), "frequencies must be at least 0, got -1"),
        (lambda: MLP(2, context_dim=-1), "context_dim must be at least 0, got -1"),
        (lambda: MLP(2, bandwidth=0.0), "bandwidth must be positive, got 0.0"),
        (
            lambda: MLP(2, context_dim=3)(torch.zeros(1, 2), torch.zeros(1)),
            "context must have length 3, got 0",
        ),
        (
            lambda: MLP(2)(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 4)),
            r"context must have shape \(1, 0\), got \(1, 4\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- ensembles --------------------------------------------------------------------------


def test_mish_and_its_gradient():
    x = torch.linspace(-60, 90, 3001, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mine, theirs = mish(x), torch.nn.functional.mish(y)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    for value in (mine, theirs):
        value.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(mish(x), theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["mish", "relu"])
def test_an_ensemble_is_its_members(activation):
    options = {"members": 3, "width": 8, "depth": 2, "activation": activation}
    ensemble = EnsembleMLP([3, 2], 4, **options, generator=rng()).double()
    nonlinearity = getattr(torch.nn.functional, activation)
    x, y = normal(7, 3), normal(7, 2)
    whole = ensemble(x, y)
    for i in range(3):
        h = torch.cat([x, y], -1)
        for weight, bias in zip(ensemble.weights, ensemble.biases, strict=True):
            last = weight is ensemble.weights[-1]
            h = h @ weight[i] + bias[i]
            h = h if last else nonlinearity(h)
        torch.testing.assert_close(whole[i], h)
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("n", [3, 40])
def test_shared_pieces_are_as_if_repeated(n, grad):
    """Pieces with an axis of size one, or without it; in chunks where there are many rows."""
    ensemble = EnsembleMLP([3, 2], 1, members=2, width=8, generator=rng()).double()
    state, action = normal(n, 1, 3), normal(n, 100, 2)
    with torch.set_grad_enabled(grad):
        expected = ensemble(state.expand(n, 100, 3).reshape(-1, 3), action.reshape(-1, 2))
        torch.testing.assert_close(ensemble(state, action), expected.view(2, n, 100, 1))
        alone = ensemble(state[0, 0], action[0])
        torch.testing.assert_close(alone, expected.view(2, n, 100, 1)[:, 0])


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_single_precision_by_either_product(fast, layer_norm, activation, monkeypatch):
    """By oneDNN and by PyTorch's own products, values and gradients against double precision."""
    if not fast:
        monkeypatch.setattr(ensemble_module, "_LINEAR", None)
    options = {"width": 40, "layer_norm": layer_norm, "activation": activation}
    ensemble = EnsembleMLP([3, 2], 1, members=2, **options, generator=rng())
    reference = copy.deepcopy(ensemble).double()
    x, y = normal(500, 3), normal(500, 2).requires_grad_()
    exact = reference(x, y)
    exact.square().mean().backward()
    expected, y.grad = y.grad, None
    with torch.no_grad():
        found = ensemble(x.float(), y.float())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    again = ensemble(x.float(), y.float())
    torch.testing.assert_close(again, found, rtol=0, atol=1e-5)
    again.square().mean().backward()
    torch.testing.assert_close(y.grad, expected, rtol=0, atol=1e-6)
    for one, other in zip(ensemble.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


def test_one_state_with_many_actions():
    """More rows than a chunk, and a first axis of one, along which nothing can be cut."""
    ensemble = EnsembleMLP([3, 2], 1, members=2, width=8, generator=rng()).double()
    state, action = normal(1, 1, 3), normal(1, 3000, 2)
    with torch.no_grad():
        found = ensemble(state, action)
    torch.testing.assert_close(found, ensemble(state, action))


def test_a_bias_learns_where_its_weight_is_frozen():
    ensemble = EnsembleMLP([3], 1, members=2, width=8, generator=rng())
    ensemble.weights.requires_grad_(False)
    ensemble(normal(5, 3).float()).sum().backward()
    assert all(bias.grad is not None for bias in ensemble.biases)
    torch.testing.assert_close(ensemble.biases[-1].grad, torch.full((2, 1, 1), 5.0))


def test_layer_normalisation():
    """Against PyTorch's layers, with gains and shifts that are not 1 and 0."""
    ensemble = EnsembleMLP([3], 2, members=2, width=8, depth=2, layer_norm=True).double()
    for i, each in enumerate([*ensemble.gains, *ensemble.shifts, *ensemble.biases]):
        torch.nn.init.normal_(each, generator=rng(i))
    x = normal(20, 3)
    for member in range(2):
        h = x
        for layer in range(3):
            h = h @ ensemble.weights[layer][member] + ensemble.biases[layer][member]
            if layer < 2:
                gain, shift = ensemble.gains[layer][member, 0], ensemble.shifts[layer][member, 0]
                h = torch.nn.functional.mish(torch.nn.functional.layer_norm(h, (8,), gain, shift))
        torch.testing.assert_close(ensemble(x)[member], h)
        with torch.no_grad():
            torch.testing.assert_close(ensemble(x)[member], h)


def test_initial_weights_are_those_of_the_published_code():
    """Normal with deviation 1/sqrt(inputs), cut at twice that: deviation 0.8796 of it."""
    ensemble = EnsembleMLP([256], 1, members=4, width=256, generator=rng())
    weight = ensemble.weights[1] * 16
    assert weight.abs().max() <= 2 and weight.std().item() == pytest.approx(0.8796, abs=0.005)
    assert all(not bias.any() for bias in ensemble.biases)


@pytest.mark.bad_input
def test_bad_ensembles():
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        EnsembleMLP([3], 1, members=0)
    with pytest.raises(ValueError, match="inputs must be lengths"):
        EnsembleMLP([], 1)
    with pytest.raises(ValueError, match="activation must be 'mish' or 'relu', got 'tanh'"):
        EnsembleMLP([3], 1, activation="tanh")
    with pytest.raises(ValueError, match=r"pieces must have lengths \(3,\), got \(2,\)"):
        EnsembleMLP([3], 1)(torch.zeros(5, 2))


def test_contexts_are_standardised():
    network = MLP(1, context_dim=2, width=8, generator=rng())
    context = 300 + 50 * torch.randn(1000, 2, generator=rng(1))
    context[:, 1] = 7.0  # does not vary
    plain = MLP(1, context_dim=2, width=8, generator=rng())
    torch.nn.init.ones_(network.output.weight)
    torch.nn.init.ones_(plain.output.weight)
    network.standardise_context(context)
    x, level = torch.randn(1000, 1, generator=rng(2)), torch.zeros(1000)
    by_hand = (context - context.mean(0)) / torch.tensor([context[:, 0].std().item(), 1.0])
    torch.testing.assert_close(
        network(x, level, context), plain(x, level, by_hand), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_operations_compute_the_same(layer_norm, activation, dtype):
    """With and without gradients, and mapped over several networks as each alone."""
    options = {"members": 2, "width": 16, "depth": 2, "layer_norm": layer_norm}
    options["activation"] = activation
    made = [
        EnsembleMLP([3, 2], 4, **options, generator=torch.Generator().manual_seed(k)).to(dtype)
        for k in range(3)
    ]
    rng = torch.Generator().manual_seed(9)
    first = torch.randn(3, 5, 1, 3, generator=rng, dtype=dtype)
    second = torch.randn(3, 5, 7, 2, generator=rng, dtype=dtype)
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    expected = [net(a, b) for net, a, b in zip(made, first, second, strict=True)]
    slopes = [
        torch.autograd.grad(y.square().sum(), list(net.parameters()))
        for net, y in zip(made, expected, strict=True)
    ]
    for net in made:
        net.plain = True
    parameters, buffers = torch.func.stack_module_state(made)

    def one(tensors, a, b):
        return torch.func.functional_call(made[0], (tensors, buffers), (a, b))

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(made[1](first[1], second[1]), expected[1], **close)
            mapped = torch.vmap(one)(parameters, first, second)
            torch.testing.assert_close(mapped, torch.stack(expected), **close)
    found = torch.autograd.grad(mapped.square().sum(), list(parameters.values()))
    for k in range(3):
        for mine, theirs in zip(found, slopes[k], strict=True):
            torch.testing.assert_close(mine[k], theirs, rtol=1e-3, atol=100 * close["atol"])
