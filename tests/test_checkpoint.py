"""Checkpoints: round trips, atomicity, damage, foreign files, and that loading runs nothing."""

import enum
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsm_sampler import CheckpointError, checkpoint, schema

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
PAYLOAD = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        PLAIN,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=4,
)


class Color(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints") / "last.pt"


@given(payload=PAYLOAD)
def test_plain_payloads_come_back_as_they_were(file, payload):
    checkpoint.save(file, payload, kind="test", version=1)
    # repr tells 1 from 1.0 and from True, -0.0 from 0.0, and takes NaN for equal to itself
    assert repr(checkpoint.load(file, kind="test")) == repr(payload)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    tensor = torch.arange(-3, 9).reshape(3, 4).to(dtype)
    payload = {"plain": tensor, "view": tensor.T[1:], "empty": tensor[:0], "scalar": tensor[1, 1]}
    checkpoint.save(tmp_path / "a.pt", payload, kind="test", version=1)
    loaded = checkpoint.load(tmp_path / "a.pt", kind="test")
    assert loaded.keys() == payload.keys()
    for name, value in payload.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], value)


def test_a_view_is_saved_without_the_storage_it_looks_at(tmp_path):
    buffer = torch.zeros(1_000_000)
    checkpoint.save(tmp_path / "a.pt", {"head": buffer[:10]}, kind="test", version=1)
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_an_expanded_tensor_is_saved_in_full(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"a": torch.ones(1).expand(5)}, kind="test", version=1)
    loaded = checkpoint.load(tmp_path / "a.pt", kind="test")["a"]
    assert torch.equal(loaded, torch.ones(5)) and loaded.untyped_storage().nbytes() == 20


def test_module_and_optimiser_go_on_as_if_never_stopped(tmp_path):
    def build():
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return network, torch.optim.Adam(network.parameters(), lr=0.1)

    def step(network, optimiser):
        optimiser.zero_grad()
        network(torch.linspace(-1, 1, 15).reshape(5, 3)).square().sum().backward()
        optimiser.step()

    network, optimiser = build()
    step(network, optimiser)
    payload = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
    checkpoint.save(tmp_path / "a.pt", payload, kind="test", version=1)
    step(network, optimiser)

    other, other_optimiser = build()
    loaded = checkpoint.load(tmp_path / "a.pt", kind="test")
    other.load_state_dict(loaded["network"])
    other_optimiser.load_state_dict(loaded["optimiser"])
    step(other, other_optimiser)
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_parameters_are_saved_without_their_gradient(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    checkpoint.save(tmp_path / "a.pt", {"w": weight, "w2": weight * 2}, kind="test", version=1)
    loaded = checkpoint.load(tmp_path / "a.pt", kind="test")
    assert type(loaded["w"]) is torch.Tensor
    assert not loaded["w"].requires_grad
    assert not loaded["w2"].requires_grad


def test_states_of_other_random_generators_fit_in(tmp_path):
    numpy_state = np.random.default_rng(0).bit_generator.state  # integers of 128 bits
    payload = {"numpy": numpy_state, "python": random.Random(0).getstate()}
    checkpoint.save(tmp_path / "a.pt", payload, kind="test", version=1)
    assert checkpoint.load(tmp_path / "a.pt", kind="test") == payload


def test_generators_go_on_with_the_same_numbers(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.randn(7, generator=generator)
    payload = {"rng": checkpoint.generator_state(generator)}
    checkpoint.save(tmp_path / "a.pt", payload, kind="test", version=1)
    expected = torch.randn(100, generator=generator)

    other = torch.Generator()
    checkpoint.restore_generator(other, checkpoint.load(tmp_path / "a.pt", kind="test")["rng"])
    assert torch.equal(torch.randn(100, generator=other), expected)


def test_a_generator_state_does_not_change_device():
    state = checkpoint.generator_state(torch.Generator()) | {"device": "cuda"}
    with pytest.raises(CheckpointError, match="taken on cuda, but the generator draws on cpu"):
        checkpoint.restore_generator(torch.Generator(), state)


def test_the_header_tells_what_the_file_is(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {}, kind="test", version=3)
    header = checkpoint.read_header(tmp_path / "a.pt")
    assert header.pop("library")
    assert header == {"format": 1, "kind": "test", "version": 3}


# What a payload may hold


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Color.RED, "Color"),
        (Point(1, 2), "Point"),
        ({1, 2}, "builtins.set"),
        (b"bytes", "builtins.bytes"),
        (print, "builtins.builtin_function_or_method"),
        (torch.float32, "torch.dtype"),
        (torch.device("cpu"), "torch.device"),
        (torch.nn.Linear(1, 1), "Linear"),
        (torch.eye(2).to_sparse(), "torch.Tensor"),
    ],
)
def test_other_objects_are_refused_by_the_name_of_their_key(tmp_path, value, kind):
    with pytest.raises(CheckpointError, match=rf"payload\['a'\]\[1\]\['b'\] is a .*{kind}"):
        checkpoint.save(tmp_path / "a.pt", {"a": [0, {"b": value}]}, kind="test", version=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [1.5, None, (1, 2), True])
def test_keys_are_strings_or_integers(tmp_path, key):
    with pytest.raises(CheckpointError, match="keys must be str or int"):
        checkpoint.save(tmp_path / "a.pt", {"a": {key: 1}}, kind="test", version=1)


def test_ordered_dicts_become_plain_ones(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"a": OrderedDict(x=1)}, kind="test", version=1)
    assert type(checkpoint.load(tmp_path / "a.pt", kind="test")["a"]) is dict


@pytest.mark.bad_input
def test_the_payload_is_a_dict(tmp_path):
    with pytest.raises(CheckpointError, match="payload must be a dict, got list"):
        checkpoint.save(tmp_path / "a.pt", [1], kind="test", version=1)


def test_versions_start_at_one(tmp_path):
    with pytest.raises(ValueError, match="version must be at least 1, got 0"):
        checkpoint.save(tmp_path / "a.pt", {}, kind="test", version=0)


# Writing


def test_folders_are_made_and_nothing_else_stays(tmp_path):
    path = tmp_path / "runs" / "1" / "last.pt"
    checkpoint.save(path, {"a": 1}, kind="test", version=1)
    checkpoint.save(str(path), {"a": 2}, kind="test", version=1)
    assert checkpoint.load(str(path), kind="test") == {"a": 2}
    assert list(path.parent.iterdir()) == [path]


def test_the_file_has_the_permissions_of_any_other(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {}, kind="test", version=1)
    (tmp_path / "b.pt").touch()
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "b.pt").stat().st_mode


def test_a_link_stays_a_link(tmp_path):
    checkpoint.save(tmp_path / "real.pt", {"a": 1}, kind="test", version=1)
    (tmp_path / "last.pt").symlink_to("real.pt")
    checkpoint.save(tmp_path / "last.pt", {"a": 2}, kind="test", version=1)
    assert (tmp_path / "last.pt").is_symlink()
    assert checkpoint.load(tmp_path / "real.pt", kind="test") == {"a": 2}


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"a": 1}, kind="test", version=1)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    target = {"write": (torch, "save"), "sync": (os, "fsync"), "rename": (type(path), "replace")}
    monkeypatch.setattr(*target[moment], interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"a": 2}, kind="test", version=1)
    monkeypatch.undo()
    assert checkpoint.load(path, kind="test") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import os, sys, time
import torch
from rsm_sampler import checkpoint
def wait(descriptor):
    print("writing", flush=True)
    time.sleep(600)
os.fsync = wait
checkpoint.save(sys.argv[1], {"a": torch.zeros(1000)}, kind="test", version=1)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing a checkpoint; its temporary file is there."""
    path = tmp_path / "a[1].pt"  # no pattern of names
    checkpoint.save(path, {"a": 1}, kind="test", version=1)
    command = [sys.executable, "-c", WRITER, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process, path
        process.kill()


@pytest.mark.parametrize("how", ["save", "load", "header"])
def test_what_a_killed_writer_left_is_removed(writer, how):
    process, path = writer
    other = path.with_name(".b.pt.0123abcd-1-0123abcd.tmp")
    other.touch()  # of another file
    assert len(list(path.parent.iterdir())) == 3

    def touch():
        if how == "save":
            checkpoint.save(path, {"a": 1}, kind="test", version=1)
        elif how == "load":
            assert checkpoint.load(path, kind="test") == {"a": 1}
        else:
            checkpoint.read_header(path)
        return sorted(entry.name for entry in path.parent.iterdir())

    assert len(touch()) == 3  # its writer lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert touch() == sorted([path.name, other.name])


def test_temporary_files_of_other_machines_stay(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    foreign = tmp_path / f".a.pt.00000000-{2**22 + 1}-0123abcd.tmp"  # beyond Linux' last number
    foreign.touch()
    own = tmp_path / f".a.pt.{checkpoint._host()}-{2**22 + 1}-0123abcd.tmp"
    own.touch()
    checkpoint.save(path, {}, kind="test", version=1)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, path])


# Reading what is not there, not whole, or not ours


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pt"):
        checkpoint.load(tmp_path / "none.pt", kind="test")


@pytest.mark.bad_input
def test_an_unknown_device(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {}, kind="test", version=1)
    with pytest.raises(RuntimeError, match="abacus"):
        checkpoint.load(tmp_path / "a.pt", kind="test", map_location="abacus")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short(tmp_path, share):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"a": torch.arange(1000)}, kind="test", version=1)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read as a checkpoint: it is cut"):
        checkpoint.load(path, kind="test")


def test_a_flipped_bit_in_a_tensor(tmp_path):
    path = tmp_path / "a.pt"
    tensor = torch.arange(1000, dtype=torch.float64)
    checkpoint.save(path, {"a": tensor}, kind="test", version=1)
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read as a checkpoint"):
        checkpoint.load(path, kind="test")


@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\x03\x04 nor this", bytes(5000)])
def test_other_files(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "a.pt", kind="test")


def test_another_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "a.pt", kind="test")


@pytest.mark.parametrize("contents", [{"a": 1}, [1], torch.zeros(2), {"magic": "other"}])
def test_a_torch_file_of_others(tmp_path, contents):
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="was not written by rsm_sampler"):
        checkpoint.load(tmp_path / "a.pt", kind="test")


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", "1"), ("format", 0), ("version", True), ("library", None), ("payload", [1])],
)
def test_a_header_of_other_types(tmp_path, name, value):
    good = {"magic": checkpoint.MAGIC, "format": 1, "kind": "test", "version": 1}
    torch.save({**good, "library": "1", "payload": {}, name: value}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt must have a header with {name} of type"):
        checkpoint.load(tmp_path / "a.pt", kind="test")


def test_a_schema_names_file_key_rule_and_value(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"a": [1, -2]}, kind="test", version=1)
    allowed = schema.record({"a": schema.items(schema.integer(least=0))})
    with pytest.raises(CheckpointError, match=r"a\.pt: payload\['a'\]\[1\] must be .*, got -2"):
        checkpoint.load(tmp_path / "a.pt", kind="test", schema=allowed)


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (schema.integer(1, 9), [1, 9], [0, 10, True, 2.0, "1", None, 10**400]),
        (schema.number(0.0), [0, 1.5], [-1e-9, math.nan, math.inf, True, "1", 10**400]),
        (schema.number(finite=False, nan=True), [math.nan, -math.inf, 3], [None, "1", 10**400]),
        (schema.number(above=0.0, most=1.0), [0.1, 1], [0, 0.0, 1.01, math.nan]),
        (schema.flag(), [True, False], [0, 1, None]),
        (schema.text(("a", "b")), ["a"], ["c", 1, b"a"]),
        (schema.optional(schema.text()), [None, "c"], [0]),
        (schema.items(schema.integer(), length=2), [[1, 2], (1, 2)], [[1], [1, "2"], "12", {}]),
        (schema.entries(schema.integer()), [{}, {"a": 1}], [{"a": "b"}, {1: 1}, [1]]),
        (
            schema.record({"a": schema.flag()}, {"b": schema.flag()}),
            [{"a": True}, {"a": True, "b": False}],
            [{}, {"b": True}, {"a": True, "c": True}, {"a": 1}, [True]],
        ),
        (schema.plain, [{"a": [1, (None, "b")]}], [{"a": torch.zeros(1)}]),
        (
            schema.tensor(2, None, dtypes=(torch.float32,)),
            [torch.zeros(2, 3)],
            [
                torch.zeros(2),
                torch.zeros(3, 3),
                torch.zeros(2, 3).double(),
                torch.full((2, 3), math.inf),
                torch.full((2, 3), math.nan),
                1.0,
            ],
        ),
        (schema.tensor(axes=0), [torch.tensor(1)], [torch.zeros(1), torch.tensor(1j)]),
    ],
)
def test_schemas(allowed, good, bad):
    for value in good:
        allowed(value, "key")
    for value in bad:
        with pytest.raises(CheckpointError, match="key"):
            allowed(value, "key")


def test_allocations_are_bounded():
    with schema.bounded(0):
        torch.nn.Linear(1000, 1000)
    with pytest.raises(CheckpointError, match=r"of shape \(100000000, 3\) is"), schema.bounded(0):
        torch.nn.Linear(3, 10**8)
    with pytest.raises(CheckpointError, match="more than the file holds"), schema.bounded(0):
        for _ in range(10**6):
            torch.zeros(1)


def test_another_kind(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {}, kind="trainer", version=1)
    with pytest.raises(CheckpointError, match="of kind 'trainer', expected 'sampler'"):
        checkpoint.load(tmp_path / "a.pt", kind="sampler")


def test_a_newer_file_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(tmp_path / "a.pt", {}, kind="test", version=1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"file format 2, written by .* up to format 1"):
        checkpoint.load(tmp_path / "a.pt", kind="test")


def test_a_newer_description(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {}, kind="test", version=3)
    assert checkpoint.load(tmp_path / "a.pt", kind="test", version=3) == {}
    with pytest.raises(CheckpointError, match=r"version 3 of kind 'test'.* up to version 2"):
        checkpoint.load(tmp_path / "a.pt", kind="test", version=2)


def test_a_description_that_is_too_old(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {}, kind="test", version=3)
    assert checkpoint.load(tmp_path / "a.pt", kind="test", least=3) == {}
    with pytest.raises(CheckpointError, match=r"version 3 of kind 'test'.* from version 4 on"):
        checkpoint.load(tmp_path / "a.pt", kind="test", least=4)


# Loading executes nothing


class Trap:
    """Unpickling this runs a command that leaves a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def _as_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


def _as_torch(value, path):
    torch.save(value, path)


def _as_old_torch(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [_as_pickle, _as_torch, _as_old_torch])
def test_a_trap_does_not_spring(tmp_path, monkeypatch, write):
    trace, path = tmp_path / "trace", tmp_path / "a.pt"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    contents = {"magic": checkpoint.MAGIC, "format": 1, "kind": "test", "payload": Trap(trace)}
    write(contents, path)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoint.load(path, kind="test")
    assert not trace.exists()

    pickle.loads(pickle.dumps(Trap(trace)))  # the trap is a real one
    assert trace.exists()
