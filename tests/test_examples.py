"""Every example runs, in its short form, and leaves its figure."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "examples"
FIGURES = {
    "demo.py": "demo.png",
    "quickstart.py": "quickstart.png",
    "black_box.py": "black_box.png",
    "conditional.py": "conditional.png",
    "eight_schools.py": "eight_schools.png",
    "multi_goal.py": "multi_goal.png",
    "paper/figure_2.py": "figure_2.png",
    "paper/figure_3.py": "table_1/figure_3.png",
    "paper/figure_4.py": "figure_4/figure_4.png",
    "paper/figure_5.py": "figure_5.png",
    "paper/table_2.py": "table_2.png",
}

pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="needs the source tree")


@pytest.mark.parametrize("name", FIGURES)
def test_it_runs_and_leaves_its_figure(name, tmp_path):
    # ArviZ announces its next version once a day.
    filters = ["-W", "error", "-W", "ignore::FutureWarning:arviz"]
    command = [sys.executable, *filters, str(ROOT / name), "--smoke"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    figure = tmp_path / "out" / FIGURES[name]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure.relative_to(tmp_path)) in result.stdout
    if name == "demo.py":
        check_demo(result.stdout, json.loads((tmp_path / "out" / "demo.json").read_text()))


def check_demo(output, numbers):
    """The table has every row, the file every number."""
    rows = ["mixing weight", "mean of mode 2", "std of mode 2", "W2, n = ", "ESS", "log Z"]
    for row in [*rows, "search", "training", "check", "witness", "seconds", "verdict"]:
        assert row in output
    assert len(numbers["panels"]) == 5
    assert set(numbers["evaluations"]) == {"search", "training", "check", "diagnosis", "witness"}


def test_the_path_of_a_gpu_runs_dry():
    command = [sys.executable, str(ROOT / "benchmarks" / "update_speed.py"), "--gpu", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "sdac {'updates_per_second'" in result.stdout


def test_its_docstring_says_what_to_expect():
    for name in FIGURES:
        text = ast.get_docstring(ast.parse((ROOT / name).read_text()))
        assert text is not None and "out/" in text, name
