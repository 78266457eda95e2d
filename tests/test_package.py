"""The house: what loads when, what may import what, and that foreign rooms are refused."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rsm_sampler

ROOT = Path(rsm_sampler.__file__).parent.parent
PACKAGES = ("rsm_sampler", "energies", "rl")


def run(code, cwd):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_importing_the_core_loads_nothing_that_can_wait():
    code = (
        "import sys, torch, rsm_sampler\n"
        "heavy = 'energies rl matplotlib tyro scipy.optimize scipy.stats gymnasium'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = run(code, ROOT)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


@pytest.mark.parametrize("room", ["energies", "rl"])
def test_a_room_loads_once_under_one_name(room):
    code = (
        "import sys, rsm_sampler\n"
        f"from rsm_sampler import {room} as first\n"
        f"import {room} as second\n"
        f"assert first is second is rsm_sampler.{room} is sys.modules[{room!r}]\n"
        f"assert {room!r} in dir(rsm_sampler)\n"
        f"assert 'rsm_sampler.{room}' not in sys.modules"
    )
    assert run(code, ROOT).stderr == ""


def test_agents_import_without_what_windows_lacks():
    code = (
        "import sys\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import rl, rl.cli\n"
        "print(callable(rl.compare))"
    )
    result = run(code, ROOT)
    assert (result.stdout.strip(), result.stderr) == ("True", "")


def test_unknown_attributes_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'rsm_sampler' has no attribute 'kitchen'"):
        _ = rsm_sampler.kitchen
    with pytest.raises(ImportError, match="cannot import name 'kitchen'"):
        from rsm_sampler import kitchen  # noqa: F401


def test_all_names_exist():
    for name in rsm_sampler.__all__:
        assert getattr(rsm_sampler, name) is not None


# Foreign rooms


@pytest.fixture(params=["energies", "rl"])
def room(request, monkeypatch):
    """A room that has not been imported yet."""
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    return request.param


@pytest.mark.parametrize("form", ["package", "module"])
def test_a_foreign_room_is_named_and_not_run(room, form, tmp_path, monkeypatch):
    found = tmp_path / room / "__init__.py" if form == "package" else tmp_path / f"{room}.py"
    found.parent.mkdir(exist_ok=True)
    found.write_text("raise RuntimeError('foreign code was run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=re.escape(str(found))) as error:
        getattr(rsm_sampler, room)
    assert f"rsm_sampler.{room} needs the package '{room}' at {ROOT / room}" in str(error.value)
    assert "rename" in str(error.value)
    assert (error.value.name, error.value.path) == (room, str(found))
    assert room not in sys.modules


def test_a_foreign_room_imported_before_is_named(room, tmp_path, monkeypatch):
    (tmp_path / f"{room}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, room, __import__(room))
    with pytest.raises(ImportError, match=re.escape(str(tmp_path / f"{room}.py"))):
        getattr(rsm_sampler, room)


def test_a_foreign_room_without_a_file_is_refused(room, monkeypatch):
    monkeypatch.setitem(sys.modules, room, type(sys)(room))
    with pytest.raises(ImportError, match=rf"finds another '{room}' first: <module '{room}'>"):
        getattr(rsm_sampler, room)


def test_an_empty_folder_of_that_name_is_no_obstacle(room, tmp_path, monkeypatch):
    (tmp_path / room).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(getattr(rsm_sampler, room).__file__).parent == ROOT / room


def test_a_missing_room_is_said_to_be_missing(room, tmp_path, monkeypatch):
    monkeypatch.setattr(rsm_sampler, "__file__", str(tmp_path / "rsm_sampler" / "__init__.py"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:2])
    with pytest.raises(ImportError, match=rf"should stand at .*{room} but does not"):
        getattr(rsm_sampler, room)


# What may import what


def imports(path, *, top_level_only=False):
    """The modules that a file imports, by full name."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def test_the_core_imports_no_room_on_its_own():
    for path in files("rsm_sampler"):
        rooms = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        assert rooms.isdisjoint({"energies", "rl"}), path


def test_energies_do_not_import_agents():
    for path in files("energies"):
        assert "rl" not in {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(package):
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")
def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = list(project["dependencies"])
    for name in set(extras) - {"test", "docs", "dev"}:
        declared += extras[name]
    known = {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in declared}
    known.add("sklearn")  # the module of scikit-learn
    for package in PACKAGES:
        for path in files(package):
            found = {name.split(".")[0] for name in imports(path)}
            assert found <= known | set(PACKAGES) | sys.stdlib_module_names, path
