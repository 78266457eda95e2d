"""The command line, from fit to figure, and its errors in one line."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from rsm_sampler import EnergySampler, cli

TINY = [
    *("--config.steps-per-cycle", "60", "--config.max-cycles", "1", "--config.width", "16"),
    *("--config.batch-size", "128", "--config.check-draws", "77", "--config.num-steps", "8"),
    *("--config.search-evaluations", "2000", "--config.bank-size", "2000"),
]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of the user's own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(
        "calls = 0\n"
        "def energy(x):\n"
        "    return x.square().sum(-1) / 2\n"
        "def broken(x):\n"
        "    raise KeyError('lost table')\n"
        "def interrupted(x):\n"
        "    global calls\n"
        "    calls += len(x)\n"
        "    if calls > 1000:\n"
        "        raise KeyboardInterrupt\n"
        "    return energy(x)\n"
        "def interrupted_late(x):\n"
        "    if len(x) == 77:  # the check after training\n"
        "        raise KeyboardInterrupt\n"
        "    return energy(x)\n"
        "def by_numpy(x):\n"
        "    import torch\n"
        "    return torch.from_numpy((x.numpy() ** 2).sum(-1) / 2)\n"
    )
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def fitted(folder):
    assert run("fit", "mine:energy", "--dim", 2, "--output", "s.pt", *TINY) == 0
    return folder / "s.pt"


def error_line(capsys):
    """Standard error, which is one line."""
    text = capsys.readouterr().err
    assert text.startswith("rsm-sampler: error: ")
    assert text.count("\n") == 1
    return text


def test_fit_sample_diagnose(folder, capsys):
    assert run("fit", "mine:energy", "--dim", 2, "--output", "s.pt", *TINY) == 0
    out = capsys.readouterr().out
    assert re.search(r"evaluations   [\d,]+ \(search [\d,]+, check 77\)", out)
    assert "rsm-sampler diagnose s.pt --energy mine:energy" in out

    assert run("sample", "s.pt", "-n", 50, "--output", "x.npz", "--figure", "x.png") == 0
    with np.load(folder / "x.npz") as arrays:
        assert arrays.files == ["x"]
        assert arrays["x"].shape == (50, 2)
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")

    arguments = ["diagnose", "s.pt", "--energy", "mine:energy", "-n", 200, "--figure", "d.png"]
    code = run(*arguments, "--witness-evaluations", 4000)
    out = capsys.readouterr().out
    word = re.search(r"verdict +(.*)", out)
    assert word is not None
    assert code == {"trustworthy": 0, "not trustworthy": 1, "cannot tell": 3}[word[1]]
    assert "of n = 200" in out
    assert (folder / "d.png").read_bytes().startswith(b"\x89PNG")


def test_an_untrustworthy_sampler_has_status_1(fitted):
    """A sampler of one normal law is examined against an energy with two far modes."""
    arguments = ["--energy", "paper-mixture", "-n", 200, "--witness-evaluations", 4000]
    assert run("diagnose", fitted, *arguments) == 1


def test_the_file_is_the_one_of_the_library(fitted):
    """Same seed, same draws, from the command line and from Python."""
    run("sample", fitted, "-n", 7, "--seed", 3, "--output", "x.npz")
    generator = torch.Generator().manual_seed(3)
    expected = EnergySampler.load(fitted).sample(7, generator=generator)
    with np.load("x.npz") as arrays:
        assert arrays["x"].tolist() == expected.tolist()


def test_log_densities_come_with_the_samples(fitted):
    assert run("sample", fitted, "-n", 9, "--output", "x.npz", "--log-prob") == 0
    with np.load("x.npz") as arrays:
        assert arrays["log_prob"].shape == (9,)


def test_a_named_energy_knows_its_particles(folder):
    few = [*TINY, "--config.search-evaluations", "1000", "--config.chain-evaluations", "2000"]
    assert run("fit", "dw4", "--output", "s.pt", *few) == 0
    assert EnergySampler.load(folder / "s.pt").architecture["num_particles"] == 4


def test_an_energy_that_autograd_cannot_pass_is_tried_by_its_values(folder):
    """Beyond twelve dimensions gradients are asked for first."""
    few = [*TINY, "--config.chain-evaluations", "2000"]
    assert run("fit", "mine:by_numpy", "--dim", 14, "--output", "s.pt", *few) == 0


def test_a_training_that_diverges_has_status_2(folder, capsys):
    lively = [*TINY, "--config.steps-per-cycle", "300", "--config.learning-rate", "1e30"]
    assert run("fit", "mine:energy", "--dim", 2, "--output", "s.pt", *lively) == 2
    assert "loss must stay finite" in error_line(capsys)


def test_a_log_goes_on_where_the_checkpoint_is(folder):
    """And begins anew without one."""
    options = ["mine:energy", "--dim", 2, "--output", "s.pt", "--log", "log.jsonl", *TINY]
    options += ["--config.steps-per-cycle", "120", "--config.max-cycles", "2"]
    assert run("fit", *options, "--checkpoint", "c.pt") == 0
    whole = (folder / "log.jsonl").read_text()
    with (folder / "log.jsonl").open("a") as file:  # of steps that a crash took away
        file.write('{"step": 99999, "loss": 1.0}\n')
    assert run("fit", *options, "--checkpoint", "c.pt") == 0
    assert (folder / "log.jsonl").read_text() == whole
    assert run("fit", *options) == 0
    again = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in whole.splitlines()]
    assert [r["step"] for r in again] == [r["step"] for r in first]


def test_a_named_energy_knows_its_dimension(folder, capsys):
    assert run("fit", "paper-mixture", "--output", "new/p.pt", "--log", "log.jsonl", *TINY) == 0
    assert EnergySampler.load("new/p.pt").dim == 2
    assert (folder / "log.jsonl").read_text().count("\n") > 0


@pytest.mark.parametrize("bounds", [(0, "inf"), (0, "inf", "-inf", 5.5)])
def test_bounds_are_kept(bounds, folder):
    arguments = ["--dim", 2, "--bounds", *bounds, "--output", "b.pt"]
    assert run("fit", "mine:energy", *arguments, *TINY) == 0
    x = EnergySampler.load("b.pt").sample(200)
    assert bool((x[:, 0] > 0).all())
    assert bool((x[:, 1] > 0).all()) == (len(bounds) == 2)


def test_a_conditional_energy_brings_its_contexts(folder, capsys):
    arguments = ["--config.bank-contexts", 8, "--output", "c.pt"]
    assert run("fit", "conditional-line", *arguments, *TINY) == 0
    assert run("sample", "c.pt", "-n", 6, "--context", 0.5, "--output", "x.npz") == 0
    with np.load("x.npz") as arrays:
        assert arrays["x"].shape == (6, 1)
    diagnose = ["diagnose", "c.pt", "--energy", "conditional-line", "-n", 100]
    assert run(*diagnose, "--context", 0.5, "--witness-evaluations", 2000) in {0, 1, 3}
    capsys.readouterr()
    assert run("sample", "c.pt") == 2
    assert "context must be of length 1" in error_line(capsys)


def test_training_goes_on_from_its_checkpoint(folder):
    arguments = ["fit", "mine:energy", "--dim", 2, "--checkpoint", "train.pt", *TINY]
    assert run(*arguments, "--output", "first.pt") == 0
    assert run(*arguments, "--output", "second.pt") == 0
    first, second = (EnergySampler.load(name) for name in ("first.pt", "second.pt"))
    assert first.history == second.history
    assert first.sample(3).tolist() == second.sample(3).tolist()


def test_ctrl_c_in_training_keeps_what_was_learned(folder, capsys):
    assert run("fit", "mine:interrupted_late", "--dim", 2, "--output", "s.pt", *TINY) == 0
    assert "steps         60" in capsys.readouterr().out
    assert EnergySampler.load("s.pt").sample(3).isfinite().all()


def test_ctrl_c_in_the_search_has_nothing_to_keep(folder, capsys):
    assert run("fit", "mine:interrupted", "--dim", 2, "--output", "s.pt", *TINY) == 130
    assert "interrupted before there was anything to save" in capsys.readouterr().err
    assert not (folder / "s.pt").exists()


def test_an_energy_that_raises_shows_where(capsys):
    assert run("fit", "mine:broken", "--dim", 2, *TINY) == 2
    text = capsys.readouterr().err
    assert 'mine.py", line 5, in broken' in text
    assert text.endswith("rsm-sampler: error: the energy raised the KeyError above\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "mine:energy"], "dim must be given, 'mine:energy' does not know its own"),
        (["fit", "gm40"], "got 'gm40'; did you mean 'gmm40'"),
        (["fit", "nowhere:energy", "--dim", "2"], "name must start with a module"),
        (["fit", "os:system", "--dim", "2"], "name must lead to a callable energy"),
        (["fit", "mine:nothing", "--dim", "2"], "has no 'nothing'"),
        (["fit", "gmm40", "--dim", "3"], "dim must be the energy's own dimension 2, got 3"),
        (["fit", "gmm40", "--budget", "10"], "budget must be at least 500 evaluations, got 10"),
        (["fit", "gmm40", "--bounds", "1"], "bounds must be low and high"),
        (["fit", "gmm40", "--bounds", "1", "0"], "bounds must have low below high"),
        (["fit", "gmm40", "--output", "."], "a file is needed, got the folder ."),
        (["sample", "nothere.pt"], "nothere.pt"),
        (["sample", "mine.py"], "mine.py cannot be read as a checkpoint"),
        (["sample", "s.pt", "-n", "0"], "n must be at least 1, got 0"),
        (["sample", "s.pt", "--output", "x.csv"], "output must end in .npz, got x.csv"),
        (["sample", "s.pt", "--figure", "x.txt"], "figure must end in .png, .pdf, .svg"),
        (
            ["sample", "s.pt", "--log-prob", "--method", "ddim"],
            "method must be heun for log_prob, got ddim",
        ),
        (["diagnose", "nothere.pt", "--energy", "gmm40"], "nothere.pt"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in error_line(capsys)


def test_bad_arguments_have_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run("fit", "gmm40", "--seed", "many")
    assert stop.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_help_names_commands_and_energies(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("fit", "sample", "diagnose", "paper-mixture", "package.module:attribute"):
        assert word in out


def test_the_process_runs_the_same(folder):
    code = "import sys; from rsm_sampler.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", code, "sample", "nothere.pt"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert "nothere.pt" in result.stderr


def test_a_foreign_energies_folder_does_not_get_in_the_way(folder, capsys):
    (folder / "energies").mkdir()
    (folder / "energies" / "__init__.py").write_text("raise RuntimeError('foreign code was run')")
    code = "import sys; from rsm_sampler.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "fit", "mine:energy"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 2
    assert "dim must be given" in result.stderr
