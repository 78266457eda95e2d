import torch

from rsm_sampler.target.contexts import Contexts


def test_half_of_the_contexts_are_drawn_and_half_are_scattered():
    """Of 3,200 normal draws the outermost are among the 100, and no gap is left between them."""
    pools = []

    def draw(n, generator):
        pools.append(torch.randn(n, 1, generator=generator))
        return pools[-1]

    contexts = Contexts(draw, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    chosen, pool = contexts.scattered(100, generator), pools[-1]
    assert pool.shape == (3200, 1)
    assert torch.equal(chosen[:50], pool[:50])
    assert chosen.max() == pool.max() and chosen.min() == pool.min()
    distance = (pool - chosen.T).abs().amin(1)
    assert distance.max() < 0.1  # 50 points over a range of 7 leave 0.07 on either side
    assert contexts.scattered(1, generator).shape == (1, 1)


def test_coordinates_count_in_units_of_their_spread():
    """A coordinate in other units, or one that does not vary, changes nothing."""
    scale = torch.tensor([1.0, 1e4, 0.0])

    def draw(n, generator):
        return torch.randn(n, 3, generator=generator) * scale

    found = []
    for unit in (1.0, 1e-3):
        contexts = Contexts(lambda n, g, u=unit: u * draw(n, g), 3, torch.device("cpu"))
        found.append(contexts.scattered(40, torch.Generator().manual_seed(0)) / unit)
    torch.testing.assert_close(*found)
    assert (found[0][20:] / scale)[:, :2].abs().amax(0).min() > 2.5  # both reach their edges
