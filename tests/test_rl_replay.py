import numpy as np
import pytest
import torch

from rl.environments import Transition
from rl.replay import Batch, MultiStep, ReplayBuffer
from rsm_sampler import checkpoint
from rsm_sampler.checkpoint import CheckpointError


def numbered(begin, end):
    """Transitions that carry their number."""
    n = torch.arange(begin, end, dtype=torch.float32)
    return Batch(
        n[:, None].expand(-1, 3), n[:, None].expand(-1, 2), n, n[:, None] + torch.ones(3), n % 2, n
    )


def test_the_last_transitions_are_kept_in_order():
    buffer = ReplayBuffer(10, 3, 2)
    for begin, end in ((0, 4), (4, 9), (9, 16)):
        buffer.add(numbered(begin, end))
    assert len(buffer) == 10 and buffer.count == 16
    for kept, expected in zip(buffer.all(), numbered(6, 16), strict=True):
        torch.testing.assert_close(kept, expected, rtol=0, atol=0)


def test_samples_are_whole_transitions_drawn_uniformly():
    """False alarm below 1e-6: a chi-square with 7 degrees of freedom beyond 45."""
    buffer = ReplayBuffer(100, 3, 2)
    buffer.add(numbered(0, 8))
    batch = buffer.sample(8000, generator=torch.Generator().manual_seed(0))
    for part, expected in zip(batch, numbered(0, 8), strict=True):
        torch.testing.assert_close(part, expected[batch.reward.long()])
    counts = torch.bincount(batch.reward.long(), minlength=8)
    assert ((counts - 1000.0).square() / 1000).sum() < 45


def test_files_hold_what_is_new_and_old_ones_go(tmp_path):
    buffer = ReplayBuffer(10, 3, 2)
    sizes = []
    for begin, end in ((0, 4), (4, 9), (9, 16), (16, 18)):
        buffer.add(numbered(begin, end))
        buffer.save_new(tmp_path)
        buffer.prune(tmp_path)
        sizes.append(len(list(tmp_path.glob("*.pt"))))
    assert sizes == [1, 2, 2, 3]  # the second file still holds number 8 until 18 were added
    again = ReplayBuffer(10, 3, 2)
    again.load(tmp_path, 18)
    assert again.count == 18
    for kept, expected in zip(again.all(), buffer.all(), strict=True):
        assert torch.equal(kept, expected)
    # The same places in the ring: a sample by the same generator is the same.
    draws = [
        b.sample(5, generator=torch.Generator().manual_seed(1)).reward for b in (buffer, again)
    ]
    assert torch.equal(*draws)


def test_an_older_checkpoint_drops_later_transitions(tmp_path):
    buffer = ReplayBuffer(10, 3, 2)
    for begin, end in ((0, 4), (4, 9)):
        buffer.add(numbered(begin, end))
        buffer.save_new(tmp_path)
    again = ReplayBuffer(10, 3, 2)
    again.load(tmp_path, 4)
    assert again.count == 4 and again.all().reward.tolist() == [0, 1, 2, 3]
    again.add(numbered(100, 103))
    again.save_new(tmp_path)
    third = ReplayBuffer(10, 3, 2)
    third.load(tmp_path, 7)
    assert third.all().reward.tolist() == [0, 1, 2, 3, 100, 101, 102]


def test_a_missing_transition_is_an_error(tmp_path):
    buffer = ReplayBuffer(10, 3, 2)
    buffer.add(numbered(0, 4))
    buffer.save_new(tmp_path)
    with pytest.raises(CheckpointError, match="number 4 is missing"):
        ReplayBuffer(10, 3, 2).load(tmp_path, 6)


def test_size_is_known_beforehand():
    assert ReplayBuffer.size_in_bytes(1000, 17, 6) == ReplayBuffer(1000, 17, 6).nbytes == 172_000


@pytest.mark.bad_input
def test_bad_sizes():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        ReplayBuffer(0, 3, 2)
    with pytest.raises(ValueError, match="batch must have at most 10 transitions, got 11"):
        ReplayBuffer(10, 3, 2).add(numbered(0, 11))


@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("seed", range(3))
def test_returns_of_several_steps_are_those_of_the_definition(n, seed):
    """Two environments, random episodes and resets; against sums taken over whole episodes."""
    rng, discount, found = np.random.default_rng(seed), 0.9, []
    returns = MultiStep(n, discount, 2)
    episodes = [[[]], [[]]]  # of each environment, its episodes' steps
    number = 0
    for _ in range(60):
        observation = np.float32([[number], [number + 1]])
        number += 2
        valid, ended = rng.random(2) < 0.9, rng.random(2) < 0.1
        step = Transition(
            observation=np.full((2, 1), -1.0, np.float32),
            next_observation=observation + 2,
            reward=rng.normal(size=2).astype(np.float32),
            terminated=ended & (rng.random(2) < 0.5) & valid,
            ended=ended & valid,
            valid=valid,
        )
        closed = returns.add(observation, -observation, step)
        if closed is not None:
            found += [tuple(float(part) for part in row) for row in zip(*closed, strict=True)]
        for i in np.flatnonzero(valid):
            row = (observation[i, 0], step.reward[i], step.next_observation[i, 0])
            episodes[i][-1].append((*row, bool(step.terminated[i])))
            if step.ended[i]:
                episodes[i].append([])
    expected = []
    for each in (episode for one in episodes for episode in one):
        over = each is not episodes[0][-1] and each is not episodes[1][-1]
        for k in range(len(each)):
            part = each[k : k + n]
            if len(part) == n or over:
                total = sum(discount**j * float(r) for j, (_, r, _, _) in enumerate(part))
                last = part[-1]
                expected.append((each[k][0], -each[k][0], total, last[2], last[3], len(part)))
    assert len(found) == len(expected) > 20
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-5, atol=1e-6)


def test_files_of_an_older_version_hold_single_steps(tmp_path):
    old = list(numbered(0, 4))[:-1]
    path = tmp_path / "000000000000-000000000004.pt"
    checkpoint.save(path, {"rows": old}, kind="replay", version=1)
    buffer = ReplayBuffer(10, 3, 2)
    buffer.load(tmp_path, 4)
    assert torch.equal(buffer.all().span, torch.ones(4))
    assert torch.equal(buffer.all().terminated, old[-1])
