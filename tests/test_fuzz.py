"""Bad arguments, one at a time, of every public call: each is refused by its name.

For every argument of every call a list of values that cannot be meant, by what the annotation
says. A good refusal is a ``ValueError`` or ``TypeError`` that names the argument, the rule
("must") and the value. The table of calls is made from the signatures, so a new call is tried
without a line here; one that cannot be called with what stands in ``public_calls`` fails.
"""

import collections
import contextlib
import io
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import public_calls as table

pytestmark = [
    pytest.mark.bad_input,
    # Loggers that are opened to be refused something are closed by the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LIMIT = 5  # seconds for one call
CALLS = [call for call in table.public_calls() if table.exempt(call) is None]

# Names of integers that are no number of points: any large value is a wish for patience.
PATIENCE = ("evaluations", "steps", "cycles", "epochs", "budget", "thinning", "burn_in", "every",
            "iterations", "updates", "seed", "episodes", "hold", "decay", "period", "moves",
            "passes", "refill", "stages", "max_points", "chunk", "max_boxes", "workers", "step",
            "levels", "n_step", "leapfrog", "per_cycle", "per_level", "tests")  # fmt: skip
SIGNED = ("seed", "coordinate", "index", "resume_step")
POSITIVE = ("scale", "std", "noise_std", "step_size", "learning_rate", "tolerance", "sigma_min",
            "sigma_max", "min_std", "prior_std", "spacing", "df", "size")  # fmt: skip

# Calls that map points one by one, in which NaN goes in and NaN comes out, as everywhere in
# PyTorch: to look at the entries would wait for the GPU in every step of a loop.
FORMULAS = (
    "energies.adapters.", "energies.conditional.ConditionalMixture.", "energies.decay.",
    "energies.funnel.", "energies.gaussian_mixture.GaussianMixture.", "energies.many_well.",
    "energies.particles.", "energies.probabilistic.", "energies.rings.", "energies.student_t.",
    "energies.target.", "energies.two_moons.", "energies.logistic.LogisticRegression.energy",
    "energies.quadrature.InverseCDF.", "rl.base.RunningMoments.", "rl.critics.", "rl.dppo.",
    "rl.policies.", "rl.qsm.LangevinPolicy.", "rl.mixtures.", "rsm_sampler.ancestral.",
    "rsm_sampler.denoisers.", "rsm_sampler.ensemble.", "rsm_sampler.equivariant.",
    "rsm_sampler.flows.", "rsm_sampler.samplers.", "rsm_sampler.kernels.", "rsm_sampler.losses.",
    "rsm_sampler.box_kernel.", "rsm_sampler.estimators.", "rsm_sampler.annealing.",
    "rsm_sampler.networks.", "rsm_sampler.proposals.", "rsm_sampler.schedules.",
    "rsm_sampler.target.", "rsm_sampler.transitions.", "rsm_sampler.baselines.spline_flow.",
    "rsm_sampler.baselines.standard.", "rsm_sampler.baselines.flow_bootstrap.fab_loss",
    "rsm_sampler.baselines.denoising_energy_matching.idem_score", "rsm_sampler.montecarlo.markov.",
    "rsm_sampler.metrics.grid_total_variation",  # what is in no cell counts as missed
    "rsm_sampler.plotting.",  # says how many draws are not finite, and leaves them out
)  # fmt: skip


class TooLong(BaseException):
    """A call that did not come back."""


@contextlib.contextmanager
def limited(seconds):
    def ring(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def bad_values(call, name, hint, given):
    """Values that cannot be meant for an argument of this name, annotation."""
    kinds = table.kinds_of(hint)
    if not kinds or kinds & {"any", "other"}:
        return []
    bad = [] if table.optional(hint) else [("None", None)]
    bad.append(("an object", object()))
    numbers = kinds & {"int", "float", "tensor", "array"}
    if "str" not in kinds and "path" not in kinds and "device" not in kinds:
        bad.append(("a string", "3"))
    if "mapping" not in kinds:
        bad.append(("a dictionary", {}))
    if "bool" not in kinds and not kinds & {"str", "path", "callable", "class"}:
        bad.append(("a truth value", True))
    if numbers and not kinds & {"array"}:
        bad.append(("a complex number", 1j))
    if kinds & {"int", "float"}:
        bad.append(("NaN", float("nan")))
    if "int" in kinds and "float" not in kinds:
        bad += [("a fraction", 1.5), ("infinity", float("inf")), ("too large", 10**30)]
        if not kinds & {"tensor", "sequence"}:
            bad.append(("a list", [1, 2]))
        if not name.endswith(SIGNED):
            bad.append(("negative", -1))
        if not name.endswith(PATIENCE) and not name.startswith("max_") and name != "m":
            bad.append(("more than memory holds", 10**15))
    if "float" in kinds and name in POSITIVE:
        bad += [("negative", -1.0), ("zero", 0.0)]
    if kinds == {"bool"}:
        bad += [("an integer", 1), ("a fraction", 0.5)]
    if "str" in kinds and not numbers:
        bad += [("a number", 3), ("bytes", b"name")]
    if "literal" in kinds:
        bad += [("another word", "no such word"), ("a number", 3), ("a list", ["a"])]
    if "path" in kinds:
        bad += [("a number", 3), ("empty", ""), ("a null character", "a\0b")]
    if kinds & {"generator", "dtype", "callable", "class"} and not kinds & {"int", "float"}:
        bad.append(("a number", 3))
    if "device" in kinds:
        bad += [("no device", "gpu7"), ("not here", "cuda:99"), ("a number", 3)]
    if "sequence" in kinds and not numbers:
        bad += [("a number", 3), ("text", "ab")]
    if "tensor" in kinds:
        bad += bad_tensors(call, name, hint, given)
    # An AnchoredKernel is made in every update of an agent, without a look at its anchors.
    loop = call.kind != "constructor" or "AnchoredKernel" in call.name
    if call.name.startswith(FORMULAS) and loop:
        bad = [(what, value) for what, value in bad if what != "a NaN entry"]
    return bad


def bad_tensors(call, name, hint, given):
    part = next((p for p in table.parts_of(hint) if table.is_tensor(p)), None)
    like = given.get(name) if isinstance(given.get(name), Tensor) else None
    if like is None and part is not None:
        like = table.tensor_like(part)
    if like is None:
        like = torch.zeros(4, 2)
    bad = [
        ("complex entries", like.to(torch.complex64)),
        ("an array of objects", np.full(like.shape, None, dtype=object)),
        ("ragged rows", [[1.0, 2.0], [1.0]]),
        ("words", [["a", "b"]]),
    ]
    if part is None:
        return bad
    axes = part.dim_str.split()
    open_ended = any(axis.startswith("*") or axis == "..." for axis in axes)
    if like.dtype.is_floating_point:
        bad.append(("truth values as entries", torch.ones(like.shape, dtype=torch.bool)))
        if like.numel():
            spoiled = like.clone()
            spoiled.view(-1)[0] = float("nan")
            bad.append(("a NaN entry", spoiled))
    if not open_ended:
        bad.append(("one axis too many", like.unsqueeze(0).unsqueeze(0)))
    fixed = [axis for axis in axes if not axis.startswith("*") and axis != "..."]
    if fixed and "float" not in table.kinds_of(hint) and like.dim():
        bad.append(("no axes", torch.zeros((), dtype=like.dtype)))
    if fixed and is_fixed(call, name, fixed[-1], given):
        bad.append(("a column too many", torch.cat([like, like[..., :1]], -1)))
    return bad


def is_fixed(call, name, axis, valid):
    """Whether another argument, or the object, says how long an axis is."""
    if not axis.isidentifier():
        return False
    if call.kind == "method" and isinstance(getattr(table.instance(call.owner), axis, None), int):
        return True
    return any(
        table.is_tensor(part) and axis in part.dim_str.replace("#", "").split()
        for other in call.parameters
        if other.name != name and isinstance(valid.get(other.name), Tensor)
        for part in table.parts_of(call.hints[other.name])
    )


def judge(call, name, what, value):
    """What became of one bad argument: a verdict and the words it came with."""
    function, arguments = call.make()
    arguments[name] = value
    try:
        with limited(LIMIT), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            function(**arguments)
    except TooLong:
        return "hang", ""
    except (TypeError, ValueError) as error:
        words = str(error)
        # Of two tensors that do not fit together either may be named.
        pair = what in ("a column too many", "one axis too many")
        named = any(p.name in words for p in call.parameters) if pair else name in words
        ruled = " must " in words or "needs" in words
        valued = "got" in words
        return ("good" if named and ruled and valued else "vague"), words
    except Exception as error:
        return "obscure", f"{type(error).__name__}: {error}"
    return "silent", ""


def cases():
    for call in CALLS:
        valid = call.make()[1]
        for parameter in call.parameters:
            hint = call.hints.get(parameter.name)
            bad = bad_values(call, parameter.name, hint, valid)
            for what, value in bad:
                yield call, parameter.name, what, value


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FUZZ_FOLDER", str(tmp_path_factory.getbasetemp()))


def tried(chosen):
    """Verdicts of many bad arguments, and a line for each that was not refused well."""
    counts, lines = collections.Counter(), []
    for call, name, what, value in chosen:
        verdict, words = judge(call, name, what, value)
        counts[verdict] += 1
        if verdict != "good":
            lines.append(f"{verdict}: {call.name}({name}={what}) {words[:120]!r}")
    return counts, lines


def test_every_public_call_is_tried_or_exempt():
    names = {call.name for call in table.public_calls()}
    for start in table.EXEMPT:
        assert any(name.startswith(start) for name in names), f"{start} is no public call"
    for call in CALLS:
        call.make()


@pytest.mark.slow
def test_valid_arguments_are_taken():
    for call in CALLS:
        if call.name not in table.COSTLY:
            function, arguments = call.make()
            function(**arguments)


def test_some_bad_arguments_are_refused():
    chosen = list(cases())
    counts, lines = tried(chosen[:: max(1, len(chosen) // 100)])
    assert not lines, "\n".join(lines)
    assert counts["good"] >= 100


@pytest.mark.slow
def test_bad_arguments_are_refused_by_name():
    counts, lines = tried(cases())
    total = sum(counts.values())
    report = "\n".join([f"{dict(counts)} of {total}", *lines])
    assert total >= 1500
    assert counts["hang"] == counts["silent"] == 0, report
    assert counts["good"] >= 0.99 * total, report
