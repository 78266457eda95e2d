"""Pack the trained policies of finished runs as small files to publish beside a release.

    python examples/release_policies.py runs/hc runs/idp --out dist/policies
    python examples/release_policies.py --check dist/policies

Of each run its best checkpoint is packed, without what only training needs. It is evaluated again
on episodes that took no part in choosing it; that return, not the one that it was chosen for, goes
into ``policies.json``, with the run's seed, configuration and versions and the file's SHA-256.
``--check`` does as a user would: it compares the hashes, loads every policy, lets it play the same
episodes, and fails if one of them earns another return.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch

from rl.run import read_about
from rsm_sampler import rl

EPISODES, SEED = 20, 50_000  # apart from those of training's evaluations


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pack(run: Path, out: Path) -> tuple[str, dict]:
    """The policy of a run: its file's name, and what is to be known of it."""
    about = read_about(run)
    agent = rl.load(run / "best.pt", device="cpu")
    name = f"{agent.name}-{agent.env}-seed{agent.seed}.pt"
    agent.save(out / name)
    found = rl.evaluate(agent, agent.env, episodes=EPISODES, seed=SEED)
    print(f"{name}: {found}, {(out / name).stat().st_size / 1000:.0f} kB")
    return name, {
        "env": agent.env,
        "agent": agent.name,
        "seed": agent.seed,
        "updates": agent.updates,
        "mean": found.mean,
        "std": found.std,
        "episodes": EPISODES,
        "first_episode_seed": SEED,
        "sha256": digest(out / name),
        "config": about["config"],
        "versions": about["versions"],
    }


def check(folder: Path) -> None:
    """Load and evaluate what was packed.

    Raises:
        SystemExit: If a file is not the one that was packed, or earns something else.
    """
    for name, about in json.loads((folder / "policies.json").read_text()).items():
        if digest(folder / name) != about["sha256"]:
            raise SystemExit(f"{name}: not the file that policies.json describes")
        agent = rl.load(folder / name, device="cpu")
        found = rl.evaluate(
            agent, about["env"], episodes=about["episodes"], seed=about["first_episode_seed"]
        )
        print(f"{name}: {found}, {about['mean']:.1f} expected")
        # Other processors round differently, and episodes then part; their law stays the same.
        error = about["std"] * math.sqrt(2 / about["episodes"])
        if abs(found.mean - about["mean"]) > 4 * error + 1e-3 * abs(about["mean"]):
            raise SystemExit(f"{name}: earns {found.mean:.1f} instead of {about['mean']:.1f}")


def main() -> None:
    """Pack, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("dist/policies"))
    parser.add_argument("--check", type=Path, help="a folder of packed policies")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.check is not None:
        check(arguments.check)
        return
    if not arguments.runs:
        parser.error("folders of runs, or --check, must be given")
    arguments.out.mkdir(parents=True, exist_ok=True)
    packed = dict(pack(run, arguments.out) for run in arguments.runs)
    (arguments.out / "policies.json").write_text(json.dumps(packed, indent=1) + "\n")


if __name__ == "__main__":
    main()
