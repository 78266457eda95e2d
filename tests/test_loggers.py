"""Loggers: what is written comes back, and a log survives a crash and a resume."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsm_sampler import JSONLinesLogger, Logger, MemoryLogger, TensorBoardLogger

VALUES = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name not in ("step", "self")), st.floats(), max_size=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


def write(path, steps, **options):
    logger = JSONLinesLogger(path, **options)
    for step in steps:
        logger.log(step, loss=step / 4)
    logger.close()


def steps_of(path):
    return [record["step"] for record in JSONLinesLogger.read(path)]


@given(records=st.lists(VALUES, max_size=4))
def test_json_lines_come_back_as_they_were(folder, records):
    path = folder / "log.jsonl"
    path.unlink(missing_ok=True)
    logger = JSONLinesLogger(path)
    for step, values in enumerate(records):
        logger.log(step, **values)
    logger.close()
    expected = [{"step": step} | values for step, values in enumerate(records)]
    assert repr(JSONLinesLogger.read(path)) == repr(expected)  # NaN is itself here


def test_json_lines_are_json_for_everyone(tmp_path):
    logger = JSONLinesLogger(tmp_path / "log.jsonl")
    logger.log(7, a=math.inf, b=-math.inf, c=math.nan)
    logger.close()
    line = (tmp_path / "log.jsonl").read_text()
    assert line == '{"step": 7, "a": "inf", "b": "-inf", "c": "nan"}\n'

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(line, parse_constant=refuse)


@pytest.mark.bad_input  # the annotations ask for int and float
@pytest.mark.parametrize("logger", ["file", "memory"])
def test_numbers_of_other_libraries_become_floats(tmp_path, logger):
    logger = MemoryLogger() if logger == "memory" else JSONLinesLogger(tmp_path / "log.jsonl")
    logger.log(np.int64(3), a=torch.tensor(1.5), b=np.float32(0.25), **{"train/loss": 1})
    logger.close()
    records = getattr(logger, "records", None) or JSONLinesLogger.read(tmp_path / "log.jsonl")
    assert records == [{"step": 3, "a": 1.5, "b": 0.25, "train/loss": 1.0}]


def test_a_record_is_on_disk_before_the_next_one(tmp_path):
    logger = JSONLinesLogger(tmp_path / "runs" / "log.jsonl")
    logger.log(0, loss=1.0)
    assert steps_of(tmp_path / "runs" / "log.jsonl") == [0]
    logger.close()
    logger.close()


def test_an_existing_file_is_appended_to(tmp_path):
    write(tmp_path / "log.jsonl", [0, 1])
    write(tmp_path / "log.jsonl", [2])
    assert steps_of(tmp_path / "log.jsonl") == [0, 1, 2]


def test_a_log_cut_short_anywhere_is_read_and_continued(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [0, 1, 2])
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        # a record that lacks nothing but its line end is whole
        whole = sum(end - 1 <= cut for end in ends)
        assert steps_of(path) == list(range(whole)), cut
        write(path, [9])
        assert steps_of(path) == [*range(whole), 9], cut


def test_a_resumed_log_equals_one_that_never_stopped(tmp_path):
    write(tmp_path / "straight.jsonl", [0, 10, 20, 30])
    write(tmp_path / "resumed.jsonl", [0, 10, 20])  # stopped after step 20, checkpoint at 15
    write(tmp_path / "resumed.jsonl", [20, 30], resume_step=15)
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    assert straight.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(-1, []), (0, [0]), (15, [0, 10]), (99, [0, 10, 20])]
)
def test_the_resume_step_itself_is_kept(tmp_path, resume_step, kept):
    write(tmp_path / "log.jsonl", [0, 10, 20])
    write(tmp_path / "log.jsonl", [], resume_step=resume_step)
    assert steps_of(tmp_path / "log.jsonl") == kept


@pytest.mark.parametrize("content", ["notes", "notes\n", "[1]\n", '{"loss": 1.0}\n', "\n"])
def test_other_files_are_named_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"notes\.txt, line 1: expected a record like"):
        JSONLinesLogger(path)
    with pytest.raises(ValueError, match=r"notes\.txt, line 1: expected a record like"):
        JSONLinesLogger.read(path)
    assert path.read_text() == content


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [0, 1, 2])
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1][:9] + "\n"
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match="line 2"):
        JSONLinesLogger.read(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        JSONLinesLogger.read(tmp_path / "none.jsonl")


def test_memory_logger_gives_columns():
    logger = MemoryLogger()
    logger.log(0, loss=3.0)
    logger.log(5, loss=2.0, ess=0.5)
    assert logger.column("loss") == ([0, 5], [3.0, 2.0])
    assert logger.column("ess") == ([5], [0.5])
    assert logger.column("other") == ([], [])


def test_whatever_logs_and_closes_is_a_logger(tmp_path):
    class Mine:
        def log(self, step, **values): ...

        def close(self): ...

    file = JSONLinesLogger(tmp_path / "log.jsonl")
    file.close()
    assert all(isinstance(logger, Logger) for logger in (Mine(), MemoryLogger(), file))
    assert not isinstance([], Logger)


def test_a_missing_tensorboard_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'rsm-sampler\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)


def test_tensorboard_logger_writes_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((None, [0, 1, 2]), (1, [2])):
        logger = TensorBoardLogger(tmp_path, resume_step=resume_step)
        for step in steps:
            logger.log(step, **{"train/loss": step / 4})
        logger.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(0, 0.0), (1, 0.25), (2, 0.5)]
