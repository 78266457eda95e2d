r"""The command line: learn an energy, draw from what was learned, ask how far to trust it.

.. code-block:: console

    rsm-sampler explore paper-mixture
    rsm-sampler fit paper-mixture --output sampler.pt
    rsm-sampler sample sampler.pt -n 10000 --output samples.npz --figure samples.png
    rsm-sampler diagnose sampler.pt --energy paper-mixture

An energy is a name that :func:`energies.names` knows, or the import path of the user's own,
``package.module:attribute``, looked for in the current folder first. Results go to standard
output, progress and errors to standard error. The exit status is 0; 1 if ``diagnose`` or
``explore`` finds that the samples are not trustworthy, 3 if it cannot tell; 2 for an error; 130
if Ctrl-C came before there was anything to save.
"""

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional, arg

from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.energy_sampler import EnergySampler
from rsm_sampler.exploration import explore as explored
from rsm_sampler.loggers import JSONLinesLogger
from rsm_sampler.plotting import (
    new_figure,
    plot_marginal,
    plot_samples,
    plot_training,
    plot_weights,
    save_figure,
)
from rsm_sampler.target.energy import BudgetExceededError
from rsm_sampler.trainer import DivergedError, EnergyDiffusionTrainer
from rsm_sampler.trainer_config import TrainerConfig
from rsm_sampler.verdict.referee import RefereeName

__all__ = ["diagnose", "explore", "fit", "main", "sample"]

_STATUS = {"trustworthy": 0, "not trustworthy": 1, "cannot tell": 3}
_FIGURES = (".png", ".pdf", ".svg")
_DESCRIPTION = """Sample any energy with a diffusion model, and know how far to trust it.

An ENERGY is a name or the import path of your own, package.module:attribute,
looked for in the current folder first: a function of points (n, dim) that
returns n values, low where likely. The names are

"""

Energy = Annotated[str, arg(metavar="ENERGY")]
SamplerFile = Annotated[Path, arg(metavar="SAMPLER")]
Draws = Annotated[int, arg(aliases=["-n"])]
OptionalDraws = Annotated[int | None, arg(aliases=["-n"])]
OptionalFile = Annotated[Path | None, arg(metavar="FILE")]
OptionalInt = Annotated[int | None, arg(metavar="INT")]
OptionalFloat = Annotated[float | None, arg(metavar="FLOAT")]
Numbers = Annotated[tuple[float, ...] | None, arg(metavar="FLOAT...")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Arguments:
        arguments: What stands after ``rsm-sampler``; that of the process if None.

    Returns:
        The exit status.
    """
    # Before the current folder joins sys.path, where another package may have that name.
    from rsm_sampler import energies

    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"explore": explore, "fit": fit, "sample": sample, "diagnose": diagnose},
            prog="rsm-sampler",
            description=_DESCRIPTION + ", ".join(energies.names()) + ".",
            args=None if arguments is None else list(arguments),
        )
    except _EnergyFailure as failure:
        cause = failure.__cause__
        assert cause is not None
        sys.stderr.write("".join(traceback.format_exception(cause)))
        return _fail(f"the energy raised the {type(cause).__name__} above")
    except (
        BudgetExceededError,
        CheckpointError,
        DivergedError,
        ImportError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        return _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        sys.stderr.write("rsm-sampler: interrupted before there was anything to save\n")
        return 130


def explore(
    energy: Positional[Energy],
    *,
    output: OptionalFile = None,
    dim: OptionalInt = None,
    ess: float = 10_000,
    budget: OptionalInt = None,
    seconds: OptionalFloat = None,
    seed: int = 0,
    bounds: Numbers = None,
    centre: Numbers = None,
    scale: OptionalFloat = None,
) -> int:
    """Find weighted draws, log Z and the basins of an energy, without training.

    Arguments:
        energy: Name or import path of the energy.
        output: File for the arrays x (n, dim) and log_weight (n), an .npz file.
        dim: Length of a point; needed if the energy does not know it by itself.
        ess: Effective draws that are enough.
        budget: Most energy evaluations.
        seconds: Time after which no phase is begun.
        seed: Decides every random number.
        bounds: Low and high end of all coordinates, or of each in turn; inf is no bound.
        centre: Where to look first, one number for each coordinate.
        scale: Width to look at, if known to an order of magnitude.

    Returns:
        The exit status.
    """
    target = _load_energy(energy)
    dim = _known_dim(target, dim, energy)
    if output is not None and output.suffix != ".npz":
        raise ValueError(f"output must end in .npz, got {output}")
    _make_room(output)
    found = explored(
        target,
        dim,
        bounds=None if bounds is None else _pairs(bounds, dim),
        seed=seed,
        ess=ess,
        budget=budget,
        seconds=seconds,
        centre=centre,
        scale=scale,
    )
    _write(str(found))
    if output is not None:
        np.savez(output, x=found.x.numpy(), log_weight=found.log_weight.numpy())
        _write(f"{output}: x and log_weight of {len(found.x):,} draws in {dim} dimensions")
    return _STATUS[found.verdict]


def fit(
    energy: Positional[Energy],
    *,
    output: Path = Path("sampler.pt"),
    dim: OptionalInt = None,
    budget: OptionalInt = None,
    seed: int = 0,
    bounds: Numbers = None,
    centre: Numbers = None,
    scale: OptionalFloat = None,
    device: str = "auto",
    checkpoint: OptionalFile = None,
    warm_start: OptionalFile = None,
    log: OptionalFile = None,
    config: TrainerConfig = TrainerConfig(),  # noqa: B008
) -> int:
    """Learn a sampler from an energy and write it to a file.

    Ctrl-C ends the training and writes what was learned so far.

    Arguments:
        energy: Name or import path of the energy.
        output: File for the sampler.
        dim: Length of a point; needed if the energy does not know it by itself.
        budget: Most energy evaluations, search included.
        seed: Decides every random number.
        bounds: Low and high end of all coordinates, or of each in turn; inf is no bound.
        centre: Where to look first, one number for each coordinate.
        scale: Width to look at, if known to an order of magnitude.
        device: Where to compute: auto, cpu, cuda, ...
        checkpoint: File that training is saved to on the way, and goes on from if it exists.
        warm_start: A sampler to start from.
        log: File for one line of JSON per record of the training; one that is there is begun
            anew, or taken up where the checkpoint is.
        config: How to train.

    Returns:
        The exit status.
    """
    target = _load_energy(energy)
    dim = _known_dim(target, dim, energy)
    for path in (output, checkpoint, log):
        _make_room(path)
    draw_context = getattr(target.energy, "sample_context", None)
    trainer = EnergyDiffusionTrainer(
        target,
        dim,
        context_dim=getattr(target.energy, "context_dim", None),
        context=draw_context,
        bounds=None if bounds is None else _pairs(bounds, dim),
        seed=seed,
        device=device,
        budget=budget,
        centre=centre,
        scale=scale,
        warm_start=None if warm_start is None else EnergySampler.load(warm_start),
        config=config,
    )
    done = -1 if checkpoint is None else EnergyDiffusionTrainer.step_of(checkpoint)
    logger = None if log is None else JSONLinesLogger(log, resume_step=done)
    try:
        sampler = trainer.fit(checkpoint_path=checkpoint, logger=logger)
    finally:
        if logger is not None:
            logger.close()
    sampler.save(output)
    spent = ", ".join(f"{name} {count:,}" for name, count in trainer.energy.counts.items())
    last: dict[str, float] = trainer.history[-1] if trainer.history else {}
    ess, log_z = last.get("ess", math.nan), last.get("log_z", math.nan)
    _write(f"sampler       {output}")
    _write(f"evaluations   {trainer.evaluations:,} ({spent})")
    _write(f"last check    ESS {ess:.1%}, log Z {log_z:.4f}" if last else "last check    none")
    _write(f"steps         {trainer.step:,} in {trainer.seconds:.0f} s")
    _write(f"next          rsm-sampler diagnose {output} --energy {energy}")
    return 0


def sample(
    sampler: Positional[SamplerFile],
    *,
    n: Draws = 10_000,
    output: Path = Path("samples.npz"),
    seed: int = 0,
    method: Literal["heun", "ddim", "ancestral", "multistep", "langevin"] | None = None,
    num_steps: OptionalInt = None,
    context: Numbers = None,
    log_prob: bool = False,
    figure: OptionalFile = None,
    device: str = "cpu",
) -> int:
    """Draw independent samples and write them to an .npz file.

    Arguments:
        sampler: File that fit wrote.
        n: Number of samples.
        output: File for the array x (n, dim), and log_prob (n) if asked for.
        seed: Decides every random number; another seed gives other samples.
        method: How to go from noise to samples; the sampler's choice if not given.
        num_steps: Number of noise levels; the trainer's choice if None.
        context: The context, for a conditional sampler.
        log_prob: Whether to write the log-density of each sample as well; with heun only.
        figure: File for a figure of the samples, .png, .pdf or .svg.
        device: Where to compute: cpu, cuda, ...

    Returns:
        The exit status.
    """
    if output.suffix != ".npz":
        raise ValueError(f"output must end in .npz, got {output}")
    if log_prob and method not in {None, "heun"}:
        raise ValueError(f"method must be heun for log_prob, got {method}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    _check_figure(figure)
    _make_room(output)
    model = EnergySampler.load(sampler, device=device)
    generator = torch.Generator(model.device).manual_seed(seed)
    given = None if context is None else torch.tensor(context)
    arrays: dict[str, Any] = {}
    if log_prob:
        x, density = model.sample_with_log_prob(
            n, context=given, num_steps=num_steps, generator=generator
        )
        arrays["log_prob"] = density.cpu().numpy()
    else:
        x = model.sample(n, context=given, method=method, num_steps=num_steps, generator=generator)
    np.savez(output, x=x.cpu().numpy(), **arrays)
    _write(f"{output}: {', '.join(['x', *arrays])} of {n:,} samples in {model.dim} dimensions")
    if figure is not None:
        _, axes = new_figure(1, 1 + min(model.dim, 2) * (model.dim > 1))
        if model.dim > 1:
            plot_samples(x, kind="density" if n > 5000 else "scatter", ax=axes[0])
        for coordinate, ax in enumerate(axes[model.dim > 1 :]):
            plot_marginal(x, coordinate=coordinate, ax=ax)
        _write(f"{save_figure(axes[0], figure)}")
    return 0


def diagnose(
    sampler: Positional[SamplerFile],
    *,
    energy: Energy,
    n: OptionalDraws = None,
    witness_evaluations: OptionalInt = None,
    effort: float = 1.0,
    referee: RefereeName | None = None,
    context: Numbers = None,
    seed: int = 0,
    figure: OptionalFile = None,
    device: str = "cpu",
) -> int:
    """Examine a sampler against a second search; the exit status says what was found.

    It is 0 for trustworthy, 1 for not trustworthy, 3 for cannot tell.

    Arguments:
        sampler: File that fit wrote.
        energy: Name or import path of the energy that it was fitted to.
        n: Number of fresh draws to examine; chosen by itself if None.
        witness_evaluations: Energy evaluations of the witness; chosen by itself if None.
        effort: Factor of the witness's evaluations.
        referee: A nested sampler to run as well.
        context: The context to examine, for a conditional sampler.
        seed: Decides every random number.
        figure: File for a figure of samples, weights and training, .png, .pdf or .svg.
        device: Where to compute: cpu, cuda, ...

    Returns:
        The exit status.
    """
    _check_figure(figure)
    target = _load_energy(energy)
    model = EnergySampler.load(sampler, energy=target, device=device)
    draw_context = getattr(target.energy, "sample_context", None)
    if model.context_dim is not None and context is None and draw_context is not None:
        model.draw_context = draw_context
    given = None if context is None else torch.tensor(context)
    diagnosis = model.diagnose(
        n,
        context=given,
        witness_evaluations=witness_evaluations,
        effort=effort,
        referee=referee,
        seed=seed,
    )
    _write(str(diagnosis))
    if figure is not None:
        if given is None and model.context_dim is not None:
            raise ValueError("context must be given for the figure of a conditional sampler")
        _write(f"{_draw_diagnosis(model, target, diagnosis.n, given, seed, figure)}")
    return _STATUS[diagnosis.verdict]


def _draw_diagnosis(
    model: EnergySampler,
    target: "_Watched",
    n: int,
    context: Tensor | None,
    seed: int,
    path: Path,
) -> Path:
    """Samples, their weights, and the course of the training."""
    generator = torch.Generator(model.device).manual_seed(seed)
    draws = model.weighted_draws(n, context=context, purpose="figure", generator=generator)
    checks = [record for record in model.history if math.isfinite(record["ess"])]
    _, axes = new_figure(1, 3 if len(checks) > 1 else 2)
    if model.dim == 1:
        plot_marginal(draws.x, ax=axes[0])
    else:
        contours = target if model.dim == 2 and context is None else None
        plot_samples(draws.x, energy=contours, ax=axes[0])
    axes[0].set_title("samples")
    plot_weights(draws.log_weight, ax=axes[1])
    if len(checks) > 1:
        plot_training(checks, against="evaluations", ax=axes[2])
        axes[2].set_title("training")
    return save_figure(axes[0], path)


class _EnergyFailure(RuntimeError):
    """The user's energy raised; the cause is what it raised.

    A RuntimeError, so that an energy that autograd cannot pass is tried by its values.
    """


class _Watched:
    """An energy that tells its own errors from ours: they are shown with their traceback."""

    def __init__(self, energy: Callable[..., Tensor]) -> None:
        self.energy = energy
        self.dim: int | None = getattr(energy, "dim", None)
        self.particles = getattr(energy, "particles", None)

    def __call__(self, *arguments: Tensor) -> Tensor:
        try:
            return self.energy(*arguments)
        except Exception as error:
            raise _EnergyFailure from error


def _load_energy(name: str) -> _Watched:
    from rsm_sampler import energies

    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return _Watched(energies.get(name))


def _known_dim(target: _Watched, dim: int | None, name: str) -> int:
    dim = target.dim if dim is None else dim
    if dim is None:
        raise ValueError(f"dim must be given, {name!r} does not know its own: --dim NUMBER")
    return dim


def _pairs(bounds: tuple[float, ...], dim: int) -> tuple[Any, Any]:
    if len(bounds) not in {2, 2 * dim}:
        raise ValueError(
            f"bounds must be low and high, once or for each of {dim} coordinates, got "
            f"{len(bounds)} numbers"
        )
    return (bounds[0], bounds[1]) if len(bounds) == 2 else ([*bounds[::2]], [*bounds[1::2]])


def _check_figure(path: Path | None) -> None:
    if path is not None and path.suffix not in _FIGURES:
        raise ValueError(f"figure must end in {', '.join(_FIGURES)}, got {path}")


def _make_room(path: Path | None) -> None:
    """Find out before the work, not after it, that a file cannot be written."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"a file is needed, got the folder {path}")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


def _fail(message: str) -> int:
    sys.stderr.write(f"rsm-sampler: error: {' '.join(message.split())}\n")
    return 2
