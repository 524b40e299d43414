"""A stand-in accelerator: tensors that say they lie on `cuda:1` or `mps`, and that the CPU computes.

Under `accelerator("cuda:1")` a tensor moved there is a wrapper around a CPU tensor. PyTorch takes it for one of a
device of its own (`privateuseone`), so that autograd, autocast, modules and optimisers treat it as foreign; every
operator on it is run on what it holds. As CUDA does, an operator refuses operands on two devices, CPU tensors without
dimensions apart, generators of another device, and `.numpy()`. What crosses to the CPU is counted, by the function of
the project that asked for it. `cuda` without a number is `cuda:0`, another device than `cuda:1`. `mps` has no float64.

What it cannot show: speed, memory, streams; what waits for the device without copying from it (`nonzero`, a mask as an
index); kernels that round otherwise or in no fixed order; operators that a device lacks (all of the CPU's are there);
other numbers from a generator (it draws the CPU's); indices out of range. An index on the CPU, which CUDA takes and
copies, is refused. Experts of a mixture are multiplied one after another, not by `grouped_mm`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import pairwise
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_leaves_with_path, tree_map, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from helpers.settings import ROOT

aten = torch.ops.aten
CROSS = {aten._to_copy.default, aten.copy_.default}
READ = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
HALVED = "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "addbmm"


class _Module(_DummyBackendModule):
    def device_count(self) -> int:
        return 2

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state, device) -> None:
        torch.set_rng_state(state)


class _Hook(_DummyPrivateUse1Hook):
    active = False

    def is_available(self) -> bool:
        return self.active  # other tests of this process have a machine without an accelerator


@cache
def registered() -> tuple[_Hook, list[torch.library.Library]]:
    """PyTorch knows the device from here on; autocast on it halves what it halves on others."""
    hook = _Hook()
    _setup_privateuseone_for_python_backend("standin", backend_module=_Module(), hook=hook)
    operators, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in HALVED:
        operators.impl(name, _halved(name), "AutocastPrivateUse1")
    return hook, [operators, others]


def _halved(name: str):
    operator = getattr(aten, name).default
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args, **kwargs):
        dtype = torch.get_autocast_dtype("standin")
        with torch._C._ExcludeDispatchKeyGuard(without):
            cast = tree_map(lambda each: each.to(dtype) if _is_float(each) else each, (args, kwargs))
            return operator(*cast[0], **cast[1])

    return call


def _is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


class Generator(torch.Generator):
    """A CPU generator that says it belongs to a device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, device="cpu")

    def __init__(self, device="cpu"):
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


class There(torch.Tensor):
    """A tensor on the stand-in, which holds a CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    named: dict[int, torch.device] = {}

    @staticmethod
    def __new__(cls, held: torch.Tensor, number: int):
        where = torch.device("standin", number)
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=where, **like)
        out.held, out.number = held, number
        return out

    def __init__(self, held: torch.Tensor, number: int):
        super().__init__()

    @property
    def device(self) -> torch.device:
        return self.named[self.number]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_mps(self) -> bool:
        return self.device.type == "mps"

    def __repr__(self) -> str:
        return f"{self.held!r} on {self.device}"

    def __tensor_flatten__(self):
        return ["held"], self.number

    @staticmethod
    def __tensor_unflatten__(held, number, size, stride):
        return There(held["held"], number)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the stand-in, outside `accelerator`")


def _place() -> str:
    """The innermost function of the project that is running, `training/loop.py:_update`, or `transformers`."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "/transformers/" in code.co_filename:
            return "transformers"
        if code.co_filename.startswith(str(ROOT / "helpers")):
            return f"{code.co_filename.removeprefix(str(ROOT / 'helpers'))[1:]}:{code.co_name}"
        frame = frame.f_back
    return "test"


class Accelerator(TorchDispatchMode):
    """Runs every operator; `read` counts what crossed to the CPU, by the place that asked for it."""

    def __init__(self, name: str):
        super().__init__()
        self.device = torch.device(name)
        self.read: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and its import takes seconds

    def real(self, device) -> torch.device:
        """What PyTorch calls this device: number 0 is the one that is worked on, as its engine wants it."""
        device = torch.device(device)
        same = (device.index or 0) == (self.device.index or 0)
        return torch.device("standin", 0 if same else 1) if device.type == self.device.type else device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        there = {each.number for each in tensors if isinstance(each, There)}
        asked = next((each for each in (kwargs.get("device"), *args) if isinstance(each, torch.device)), None)
        asked = None if asked is None else self.real(asked)
        if not there and (asked is None or asked.type != "standin"):
            return func(*args, **kwargs)
        if _composite(func):  # in inference mode such operators come whole
            with self:
                return func.decompose(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes a tensor's shape in place")
        number = self._number(func, tensors, there, asked)
        if (func in CROSS and number is None) or func in READ:
            self.read[_place()] += 1
        if "device" in kwargs and number is not None:
            kwargs["device"] = torch.device("cpu")
        held = tree_map_only(There, lambda each: each.held, (args, kwargs))
        out = _counted(*held[0], **held[1]) if func is aten.histc.default else func(*held[0], **held[1])
        if number is None:
            return args[0] if func is aten.copy_.default else out
        if self.device.type == "mps" and any(_is_double(each) for each in tree_leaves(out)):
            raise TypeError(f"{func}: an mps device has no float64")
        out = tree_map_only(torch.Tensor, lambda each: _wrapped(each, number), out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _number(self, func, tensors, there: set[int], asked) -> int | None:
        """Which of the two devices the result lies on, None for the CPU; an error where operands lie apart."""
        if func is aten.copy_.default:
            return getattr(tensors[0], "number", None)
        if asked is not None:
            return asked.index if asked.type == "standin" else None
        places = {str(each.device) for each in tensors if isinstance(each, There) or each.ndim}
        if len(places) > 1:
            raise RuntimeError(f"{func}: expected all on one device, found {', '.join(sorted(places))}")
        return min(there)


def _wrapped(held: torch.Tensor, number: int) -> There:
    with torch.inference_mode(held.is_inference()):  # of a parameter a view is none, in inference mode too
        return There(held, number)


def _grouped_mm(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """What `transformers` has a kernel for, which takes no wrapper."""
    ends = [0, *on_cpu(offs).tolist()]
    return torch.cat([input[start:end] @ each for (start, end), each in zip(pairwise(ends), weight, strict=True)])


def _counted(values: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`histc`, which on a GPU takes whole numbers too."""
    given = values if values.is_floating_point() else values.float()
    return aten.histc.default(given, *args, **kwargs).to(values.dtype)


@cache
def _composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_double(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


class _Names(TorchFunctionMode):
    """Takes the device's public name wherever PyTorch takes a device."""

    def __init__(self, machine: Accelerator):
        super().__init__()
        self.machine = machine

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if isinstance(kwargs.get("device"), str | torch.device):
            kwargs["device"] = self.machine.real(kwargs["device"])
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str):
            args = args[0], self.machine.real(args[1]), *args[2:]
        args = tree_map_only(torch.device, self.machine.real, args)
        if isinstance(random := kwargs.get("generator"), Generator):
            tensors = [each.device for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            asked = kwargs.get("device") or (tensors or [torch.device("cpu")])[0]
            if self.machine.real(random.device) != self.machine.real(asked):
                raise RuntimeError(f"{func}: the generator's device is {random.device}, not that of {asked}")
        if func == torch.Tensor.data.__set__ and isinstance(args[1], There):
            return _set_data(*args)
        if func is torch.Tensor.tolist and isinstance(args[0], There):
            args = (args[0].cpu(),)
        return func(*args, **kwargs)


def _set_data(tensor: torch.Tensor, data: There) -> None:
    """`tensor.data = data`, by which a parameter may change its device."""
    if isinstance(tensor, There):
        tensor.held = data.held
    else:
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(data, tensor.requires_grad))


@contextmanager
def accelerator(name: str = "cuda:1") -> Iterator[Accelerator]:
    """A machine with two GPUs, or with an `mps`; `name` is the one that the test works on."""
    hook, machine = registered()[0], Accelerator(name)
    kind = machine.device.type
    counted = 2 if kind == "cuda" else 0
    plain, There.named = torch.autocast, {0: machine.device, 1: torch.device(kind, 1 - (machine.device.index or 0))}

    def autocast(device_type, *args, **kwargs):
        return plain("standin" if device_type == kind else device_type, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(hook, "active", True))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch, "autocast", autocast))
        stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: counted))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: counted > 0))
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: kind == "mps"))
        stack.enter_context(mock.patch("transformers.integrations.moe._grouped_mm", _grouped_mm))
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(machine)
        stack.enter_context(_Names(machine))
        yield machine


def on_cpu(tree):
    """The same tree with what the stand-in holds; for comparisons, not counted."""
    return tree_map_only(There, lambda each: each.held, tree)


def left_behind(tree, device: torch.device | str) -> list[str]:
    """Tensors of a module, an optimiser or a tree that are not on the device; numbers without dimensions may be."""
    if isinstance(tree, torch.nn.Module):
        tree = dict(tree.named_parameters()) | dict(tree.named_buffers())
    if isinstance(tree, torch.optim.Optimizer):
        tree = {i: each for i, each in enumerate(tree.state.values())}
    found = tree_leaves_with_path(tree)
    return [f"{path}: {each.device}" for path, each in found if _is_apart(each, torch.device(device))]


def _is_apart(value, device: torch.device) -> bool:
    return isinstance(value, torch.Tensor) and value.device != device and bool(value.ndim)
