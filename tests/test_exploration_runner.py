"""The runner of the benchmarks of exploration: what is measured, judged, kept and shown."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import rsm_sampler

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree")
sys.path.insert(0, str(FOLDER))
try:
    import exploration as runner
    import exploration_page as page
    import exploration_targets as targets
finally:
    sys.path.remove(str(FOLDER))


@dataclass
class Basin:
    mass: float


@dataclass
class Coverage:
    excluded: float
    least: float = 0.5
    starts: int = 100
    unknown: int = 0

    def width(self, mass):
        return self.least


@dataclass
class Answer:
    """What an exploration returns, from exact draws."""

    x: torch.Tensor
    log_weight: torch.Tensor
    log_z: float
    verdict: str = "trustworthy"
    coverage: Coverage = field(default_factory=lambda: Coverage(0.01))
    log_z_se: float = 0.001
    ess: float = 5000.0
    evaluations: int = 5000
    counts: dict = field(default_factory=dict)
    method: str = "exact"
    basins: list = field(default_factory=lambda: [Basin(0.75), Basin(0.25)])


@pytest.fixture
def explore(monkeypatch):
    """Replaces the exploration: `change(x)` may spoil exact draws, options the rest."""

    def replace(name, change=lambda x: x, shift=0.0, told={}, **options):  # noqa: B006
        case = targets.get(name)

        def fake(energy, dim, *, seed, **arguments):
            x = change(case.draw(5000, torch.Generator().manual_seed(seed)))
            energy(x)
            assert dim == case.dim and arguments == {**case.options, **told}
            log_weight = torch.zeros(len(x), dtype=torch.float64)
            return Answer(x, log_weight, case.log_z + shift, **options)

        monkeypatch.setattr(rsm_sampler, "explore", fake, raising=False)
        return case

    return replace


def test_a_right_answer_is_reached(explore):
    explore("two_5d_half")
    record = runner.of_target("explore", "two_5d_half", 0)
    assert record["reached"] and record["within"] and not record["lie"]
    assert record["points"] == 5000 and record["basins"] == 2 and record["tv"] < 0.03
    assert record["log_z_error"] == 0 and record["seconds"] < 60


def test_a_budget_is_told(explore):
    explore("corner_2d", told={"budget": 20_000})
    assert runner.of_target("explore-20000", "corner_2d", 0)["within"]


def test_a_lost_mode_is_a_lie_only_if_trusted(explore):
    for word, lie in (("trustworthy", True), ("not trustworthy", False), ("cannot tell", False)):
        explore("two_5d_half", lambda x: x[x[:, 0] < 0], verdict=word)
        record = runner.of_target("explore", "two_5d_half", 0)
        assert record["tv"] == pytest.approx(0.25, abs=1e-3)
        assert record["lie"] is lie and not record["reached"] and record["beyond"] == ["tv"]


@pytest.mark.parametrize("shift", [0.3, -0.3, math.nan])
def test_a_wrong_log_z_is_a_lie(explore, shift):
    explore("two_5d_half", shift=shift)
    record = runner.of_target("explore", "two_5d_half", 0)
    assert record["lie"] and record["beyond"] == ["log_z"]


def test_an_untrusted_right_answer_is_not_reached(explore):
    explore("two_5d_half", verdict="cannot tell")
    record = runner.of_target("explore", "two_5d_half", 0)
    assert record["within"] and not record["reached"] and not record["lie"]


def test_of_heavy_tails_an_honest_refusal_is_right(explore):
    explore("cauchy_1d", lambda x: x[x[:, 0] > 0], verdict="not trustworthy")
    record = runner.of_target("explore", "cauchy_1d", 0)
    assert record["reached"] and not record["lie"] and not record["within"]


@pytest.mark.parametrize(
    ("excluded", "width", "lie"), [(0.01, 0.5, False), (1e-12, 0.5, True), (0.01, 5e-4, True)]
)
def test_a_hidden_mode_makes_a_lie_of_a_statement_that_excludes_it(explore, excluded, width, lie):
    case = targets.get("golf_3d")
    explore(
        "golf_3d",
        lambda x: x[(x - case.hidden.centre).norm(dim=-1) > 0.1],
        coverage=Coverage(excluded, width),
    )
    record = runner.of_target("explore", "golf_3d", 0)
    assert record["tv"] == pytest.approx(0.4, abs=1e-3)
    assert record["lie"] is lie and record["reached"] is not lie


def test_results_are_kept_and_shown(explore, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    explore("two_5d_half")
    monkeypatch.setattr(
        sys, "argv", ["exploration.py", "explore", "--targets", "two_5d_half", "--seeds", "0", "1"]
    )
    runner.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["key"] for line in lines] == ["two_5d_half/0", "two_5d_half/1"]
    runner.main()
    assert capsys.readouterr().out == ""  # nothing twice
    kept = json.loads((tmp_path / "explore.json").read_text())
    assert kept["two_5d_half/1"]["reached"] and kept["two_5d_half/0"]["machine"]["threads"] >= 1
    text = page.render()
    assert "| two_5d_half | 5 | 2 | 5,000 |" in text
    assert "| 2 trustworthy | 0 of 2 | 2 of 2 |" in text


def test_an_error_is_a_result(monkeypatch, tmp_path, capsys):
    def refuse(*_, **__):
        raise ValueError("bounds must be finite, got nan")

    monkeypatch.setattr(rsm_sampler, "explore", refuse, raising=False)
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    runner.run("explore", "spike/0", "explore")
    record = runner.load("explore")["spike/0"]
    assert record["error"] == "ValueError: bounds must be finite, got nan"
    assert not record["reached"] and not record["lie"]
    assert "error" in page.render()


def test_random_mixtures_have_modes_apart():
    dims, modes = set(), set()
    for seed in range(40):
        target = runner.random_mixture(seed)
        dims.add(target.dim)
        modes.add(len(target.loc))
        distance = torch.cdist(target.loc, target.loc) + 1e9 * torch.eye(len(target.loc))
        assert float(distance.min()) >= 6 and float(target.weights.min()) >= 0.06 / 1.001
    assert dims == set(range(2, 11)) and modes == set(range(2, 7))


def test_peers_see_the_same_energies():
    """Of the box, -energy; of the schools, the likelihood, whose mean under the prior is Z."""
    peer = runner.Peer(targets.get("shells2"))
    x = peer.transform(np.array([[0.2, 0.5], [1.0, 1.0]]))
    np.testing.assert_allclose(x, [[-3.9, 0.0], [6.5, 6.5]], atol=1e-12)
    value = -targets.get("shells2").energy(torch.as_tensor(x)).numpy()
    np.testing.assert_allclose(peer.log_likelihood(x), value)
    assert peer.offset == pytest.approx(2 * math.log(13)) and peer.energy.points == 2
    n = 400_000
    peer = runner.Peer(targets.get("eight"))
    u = torch.rand(n, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = np.exp(peer.log_likelihood(peer.transform(u.numpy())) - peer.case.log_z)
    # Likelihoods are bounded: five standard errors.
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(n)
    posterior = runner.Peer(targets.get("light-curve"))
    y = posterior.transform(np.full((1, 6), 0.4))
    prior = posterior.case.energy(torch.as_tensor(y)) - posterior.case.misfit(torch.as_tensor(y))
    assert math.isfinite(float(prior))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["light", "false-alarms", "sabotage"])
def test_the_short_form_runs(mode, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exploration.py", mode, "--smoke"])
    runner.main()
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"].lower() == (
        "not trustworthy" if mode == "sabotage" else "trustworthy"
    )
