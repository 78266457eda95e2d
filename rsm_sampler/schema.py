r"""What the payload of a checkpoint has to look like, written down once for each kind of file.

A schema is a function ``schema(value, key)`` that returns where the value is allowed and raises
:class:`~rsm_sampler.checkpoint.CheckpointError` where it is not; the message names the key, the
rule and the value. Schemas are put together from the functions below:

.. code-block:: python

    SAMPLER = record({"num_steps": integer(least=1), "network": entries(tensor())})
    SAMPLER(state, "payload")

Two more rules keep a file from asking for more than it holds. :func:`bounded` ends the building
of a network that allocates more memory than its file can fill, before it is allocated, and
:func:`fits` compares the tensors of a file with those of the network, one by one.
"""

import contextlib
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rsm_sampler.checkpoint import CheckpointError

__all__ = [
    "GENERATOR",
    "SEED",
    "Schema",
    "anything",
    "bounded",
    "entries",
    "fits",
    "flag",
    "held",
    "integer",
    "items",
    "number",
    "optimised",
    "optional",
    "plain",
    "record",
    "shown",
    "tensor",
    "text",
    "understood",
]

Schema = Callable[[Any, str], None]
"""Called with a value and the key it stands under; raises where the value is not allowed."""

_FREE = 64 << 20  # bytes: what an agent or a network may allocate whatever its file holds
_PIECE = 4096  # bytes: least account of an allocation, for its objects
_FACTORIES = frozenset(
    {
        torch.arange,
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.tril_indices,
        torch.triu_indices,
        torch.zeros,
    }
)


def shown(value: object) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    try:
        return reprlib.repr(value)
    except Exception:  # an int of more digits than Python prints
        return f"a value of type {type(value).__name__}"


def _refuse(key: str, rule: str, value: object) -> CheckpointError:
    return CheckpointError(f"{key} must be {rule}, got {shown(value)}")


def anything(value: object, key: str) -> None:
    """Allow every value, for what its own reader checks."""


def plain(value: object, key: str) -> None:
    """Allow None, numbers and text, and lists and dicts of these."""
    if isinstance(value, dict):
        for name, entry in value.items():
            plain(entry, f"{key}[{name!r}]")
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            plain(entry, f"{key}[{i}]")
    elif type(value) not in (type(None), bool, int, float, str):
        raise _refuse(key, "made of plain values", value)


def flag() -> Schema:
    """Allow True and False."""

    def check(value: object, key: str) -> None:
        if type(value) is not bool:
            raise _refuse(key, "True or False", value)

    return check


def integer(least: int = 0, most: int = 2**53) -> Schema:
    """Allow whole numbers.

    Arguments:
        least: The smallest one.
        most: The largest one.
    """

    def check(value: object, key: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _refuse(key, f"an integer from {least} to {most}", value)

    return check


def number(
    least: float = -math.inf,
    *,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
    nan: bool = False,
) -> Schema:
    """Allow numbers, whole ones too.

    Arguments:
        least: The smallest one.
        above: What it must be larger than.
        most: The largest one.
        finite: Whether infinite ones are refused.
        nan: Whether NaN is allowed.
    """
    rules = ["a number" if nan else "a number that is not NaN"]
    if finite:
        rules.append("finite" if not nan else "not infinite")
    if least > -math.inf:
        rules.append(f"at least {least}")
    if above > -math.inf:
        rules.append(f"above {above}")
    if most < math.inf:
        rules.append(f"at most {most}")
    rule = ", ".join(rules)

    def check(value: object, key: str) -> None:
        if type(value) not in (int, float) or not isinstance(value, int | float):
            raise _refuse(key, rule, value)
        if value != value:
            allowed = nan
        else:
            huge = abs(value) > 2**1000 if isinstance(value, int) else math.isinf(value)
            beyond = value < least or value > most or (above > -math.inf and value <= above)
            allowed = not beyond and not (huge and (finite or isinstance(value, int)))
        if not allowed:
            raise _refuse(key, rule, value)

    return check


SEED = integer(-(2**63), 2**64 - 2**40)
"""Allows the seeds of random generators, with room for those that are counted on from one."""


def text(choices: Sequence[str] | None = None) -> Schema:
    """Allow text.

    Arguments:
        choices: What may stand there; None for anything.
    """

    def check(value: object, key: str) -> None:
        if type(value) is not str:
            raise _refuse(key, "text", value)
        if choices is not None and value not in choices:
            raise _refuse(key, f"one of {sorted(choices)}", value)

    return check


def tensor(
    *shape: int | None,
    axes: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    finite: bool = True,
    nan: bool = False,
) -> Schema:
    """Allow tensors.

    Arguments:
        shape: Their shape; None is any length, and no shape at all is any shape.
        axes: Number of axes, where no shape is given.
        dtypes: Their precisions; None for any.
        finite: Whether infinite and NaN entries are refused; otherwise NaN alone is.
        nan: Whether any number is allowed, NaN too.
    """

    def check(value: object, key: str) -> None:
        if not isinstance(value, Tensor):
            raise _refuse(key, "a tensor", value)
        found = tuple(value.shape)
        if shape and (
            len(found) != len(shape)
            or any(n is not None and n != m for n, m in zip(shape, found, strict=True))
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise _refuse(key, f"a tensor of shape ({wanted})", value)
        if axes is not None and len(found) != axes:
            raise _refuse(key, f"a tensor with {axes} axes", value)
        if dtypes is not None and value.dtype not in dtypes:
            raise _refuse(key, f"a tensor of {' or '.join(map(str, dtypes))}", value)
        if value.dtype.is_complex:
            raise _refuse(key, "a tensor of real numbers", value)
        if value.dtype.is_floating_point and not nan:
            bad = ~value.isfinite() if finite else value.isnan()
            if bool(bad.any()):
                rule = "finite" if finite else "without NaN"
                raise CheckpointError(
                    f"{key} must be {rule}, got {int(bad.sum())} other entries of {value.numel()}"
                )

    return check


def optional(schema: Schema) -> Schema:
    """Allow None, besides what another schema allows.

    Arguments:
        schema: The other schema.
    """

    def check(value: object, key: str) -> None:
        if value is not None:
            schema(value, key)

    return check


def items(schema: Schema, *, length: int | None = None) -> Schema:
    """Allow lists and tuples.

    Arguments:
        schema: What each of their items must be.
        length: Number of items; None for any.
    """

    def check(value: object, key: str) -> None:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            rule = "a list" if length is None else f"a list of {length} items"
            raise _refuse(key, rule, value)
        for i, item in enumerate(value):
            schema(item, f"{key}[{i}]")

    return check


def entries(schema: Schema) -> Schema:
    """Allow dicts with text keys.

    Arguments:
        schema: What each of their values must be.
    """

    def check(value: object, key: str) -> None:
        if not isinstance(value, dict):
            raise _refuse(key, "a dict", value)
        for name, entry in value.items():
            if type(name) is not str:
                raise _refuse(f"the key {shown(name)} of {key}", "text", name)
            schema(entry, f"{key}[{name!r}]")

    return check


def record(
    required: Mapping[str, Schema],
    maybe: Mapping[str, Schema] | None = None,
    *,
    others: Schema | None = None,
) -> Schema:
    """Allow dicts with given keys.

    Arguments:
        required: The keys that must be there, with what must stand under each.
        maybe: The keys that may be there.
        others: What may stand under any other key; None for no others.
    """
    known = {**required, **(maybe or {})}

    def check(value: object, key: str) -> None:
        entries(anything)(value, key)
        assert isinstance(value, dict)
        for name in required:
            if name not in value:
                raise CheckpointError(f"{key} must have the key {name!r}, got {shown([*value])}")
        for name, entry in value.items():
            schema = known.get(name, others)
            if schema is None:
                raise CheckpointError(
                    f"{key} must have no keys but {sorted(known)}, got {shown(name)}"
                )
            schema(entry, f"{key}[{name!r}]")

    return check


GENERATOR = record({"device": text(), "state": tensor(None, dtypes=(torch.uint8,))})
"""Allows what :func:`rsm_sampler.checkpoint.generator_state` returns."""


def held(value: object) -> int:
    """Bytes of all tensors in a payload.

    Arguments:
        value: The payload.
    """
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(held, value.values()))
    return sum(map(held, value)) if isinstance(value, list | tuple) else 0


class _Bounded(TorchFunctionMode):
    """Adds up what is allocated, and refuses what goes beyond a limit before it is."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.left = limit

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        options = dict(kwargs or {})
        if func in _FACTORIES:
            # The generator of another device would be refused.
            outline = {k: v for k, v in options.items() if k not in ("generator", "out")}
            outline |= (
                {"device": "meta", "pin_memory": False}
                if "pin_memory" in outline
                else {"device": "meta"}
            )
            found = func(*args, **outline)
            self.left -= max(_PIECE, found.numel() * found.element_size())
            if self.left < 0:
                raise CheckpointError(
                    f"a tensor of shape {tuple(found.shape)} is asked for, which is more than "
                    "the file holds"
                )
        return func(*args, **options)


@contextlib.contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """Refuse to allocate, within the block, far more than a file holds.

    Arguments:
        nbytes: Bytes of the file's tensors. Four times as many may be allocated, and 64 MiB.

    Raises:
        CheckpointError: Where more is asked for, before it is allocated.
    """
    with _Bounded(_FREE + 4 * nbytes):
        yield


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Turn errors of a block that takes a payload apart into a CheckpointError.

    Arguments:
        what: What the payload is to be, for the message, e.g. ``"a sampler"``.

    Raises:
        CheckpointError: From any error of wrong keys, types, shapes or values.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        lines = str(error).splitlines() or [""]
        raise CheckpointError(
            f"the payload must describe {what}, got one that leads to {type(error).__name__}: "
            f"{lines[0][:200]}"
        ) from error


def fits(module: nn.Module, key: str, *, finite: bool = True) -> Schema:
    """Allow exactly the tensors of a module: their names, shapes and precisions.

    Arguments:
        module: A module of the architecture that the file describes.
        key: What the module is, for the message, e.g. ``"its architecture"``.
        finite: Whether infinite and NaN entries are refused.
    """
    schemas: dict[str, Schema] = {}
    for name, wanted in module.state_dict().items():
        if isinstance(wanted, Tensor):
            schemas[name] = _like(wanted, key, finite)
    return record(schemas)


def optimised(optimiser: torch.optim.Optimizer) -> Schema:
    """Allow the states of an Adam optimiser of the same parameters and the same settings.

    Arguments:
        optimiser: The optimiser. Its learning rate may be another one.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    groups, first = [], 0
    for own in optimiser.param_groups:
        groups.append((own, list(range(first, first + len(own["params"])))))
        first += len(own["params"])

    def check_group(own: dict[str, Any], numbers: list[int], group: Any, key: str) -> None:  # noqa: ANN401
        entries(anything)(group, key)
        for name, value in group.items():
            if name == "lr":
                wanted = tensor(axes=0) if isinstance(value, Tensor) else number(least=0.0)
                wanted(value, f"{key}['lr']")
            elif name != "params":
                plain(value, f"{key}[{name!r}]")
                known = own.get(name, value)
                if type(known) is not type(value) or known != value:
                    raise _refuse(f"{key}[{name!r}]", f"{known!r}", value)
        if "lr" not in group or group.get("params") != numbers:
            raise _refuse(key, f"a group of the parameters {numbers} with its lr", group)

    def check(value: object, key: str) -> None:
        record({"state": anything, "param_groups": items(anything, length=len(groups))})(
            value, key
        )
        assert isinstance(value, dict)
        for i, (own, numbers) in enumerate(groups):
            check_group(own, numbers, value["param_groups"][i], f"{key}['param_groups'][{i}]")
        kept = value["state"]
        if not isinstance(kept, dict) or not set(kept) <= set(range(len(parameters))):
            raise _refuse(f"{key}['state']", f"a dict of {len(parameters)} parameters", kept)
        for i, entry in kept.items():
            shape, dtype = tuple(parameters[i].shape), parameters[i].dtype
            moment = tensor(*shape, axes=len(shape), dtypes=(dtype,), finite=False)
            schema = record({"step": tensor(axes=0), "exp_avg": moment, "exp_avg_sq": moment})
            schema(entry, f"{key}['state'][{i}]")
            if not bool((entry["exp_avg_sq"] >= 0).all()) or not bool(entry["step"] >= 0):
                raise CheckpointError(
                    f"{key}['state'][{i}] must have a number of steps and squares of gradients, "
                    "got negative ones"
                )

    return check


def _like(wanted: Tensor, whose: str, finite: bool) -> Schema:
    shape, dtype, ends = tuple(wanted.shape), wanted.dtype, tensor(finite=finite)

    def check(value: object, key: str) -> None:
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            raise _refuse(key, f"a tensor of shape {shape} and {dtype}, as {whose} says", value)
        if finite:
            ends(value, key)

    return check
