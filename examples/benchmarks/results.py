"""Results of the agents' benchmarks: one JSON file each, written by several processes at once."""

import fcntl
import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from rsm_sampler import __version__

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"


def machine() -> dict:
    """Where a number comes from."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),  # speed goes with it
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rsm_sampler": __version__,
    }


def load(name: str) -> dict:
    """All results of a benchmark so far."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def store(name: str, key: str, record: dict) -> None:
    """Add one result, with the machine it was measured on."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    with Path(tempfile.gettempdir(), f"rsm_sampler_{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = {**load(name), key: {**record, "machine": machine()}}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        temporary.replace(path)
