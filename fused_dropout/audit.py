"""``audit``: every place where a model drops, seen in one forward pass in training and one in evaluation mode."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from . import attention, distributed, family, functional
from .build_info import backend_info
from .dispatch import is_covered
from .patching import FAMILY, Replacement, meet_torchs_own

_INTERNAL = tuple(str(Path(module.__file__ or "").parent) + "/" for module in (torch, functional))
_SHORT_FORMS = [name for name in vars(torch) if name.rstrip("_") in (*FAMILY, "feature_dropout")]
_TORCHS_CODE: set[CodeType | None] = {getattr(getattr(F, name), "__code__", None) for name in FAMILY}
_DRAWS = {"bernoulli", "bernoulli_", "native_dropout", "rand", "rand_like", "uniform_", "_cudnn_rnn", "miopen_rnn"}
_OFF_BY_DEFAULT = {"alpha_dropout", "feature_alpha_dropout", "drop_path"}
_ATTENTION = "scaled_dot_product_attention"
_OUT_OF_REACH = "torch, out of reach"
_IN_CUDA_KERNEL = f"{_OUT_OF_REACH}: p in steps of 1/256"  # as torch's flash attention draws


@dataclass
class Site:
    """A place that drops. module: its name in the model. call: file and line of a functional call in it, or the class
    of a module that drops by itself. p: None if it cannot be told. train, eval: whether it dropped. saved: bytes kept
    for backward; None if they cannot be told. path: what served it. shares_mask: the dimensions of device meshes along
    which all ranks drew one mask for activations that differ.
    """

    module: str
    call: str
    p: float | None = None
    train: bool = False
    eval: bool = False
    saved: int | None = 0
    path: str = "-"
    shares_mask: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module or '(model)'} [{self.call}]"


@dataclass(frozen=True)
class AuditReport:
    """What ``audit`` saw: ``sites`` in order of their first call; ``str()`` of it is a table."""

    sites: tuple[Site, ...]

    @property
    def on_in_eval(self) -> tuple[Site, ...]:
        """The sites that dropped in evaluation mode: a mistake more often than not. A draw whose p cannot be told is
        not among them, since it may be for something else."""
        return tuple(site for site in self.sites if site.eval and site.p is not None)

    @property
    def out_of_reach(self) -> tuple[Site, ...]:
        """The sites inside torch's own kernels, where neither ``patch`` nor ``convert`` gets to."""
        return tuple(site for site in self.sites if site.path.startswith(_OUT_OF_REACH))

    @property
    def one_mask_for_shards(self) -> tuple[Site, ...]:
        """The sites that draw the same mask on all ranks of a mesh for different activations. These are plain shards of
        one tensor, or the samples of data-parallel ranks that have the same seed."""
        return tuple(site for site in self.sites if site.shares_mask)

    def __str__(self) -> str:
        rows = [("site", "p", "train", "eval", "saved", "path")]
        for site in self.sites:
            p = "?" if site.p is None else f"{site.p:.6g}"
            saved = "?" if site.saved is None else f"{site.saved:,} B"
            rows.append((str(site), p, "drops" if site.train else "-", "DROPS" if site.eval else "-", saved, site.path))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.on_in_eval:
            lines.append(f"dropout is on in eval mode: {', '.join(map(str, self.on_in_eval))}")
        if self.out_of_reach:
            lines.append(f"nobody can reach: {', '.join(map(str, self.out_of_reach))}")
        if self.one_mask_for_shards:
            sites = ", ".join(f"{site} along {' and '.join(site.shares_mask)}" for site in self.one_mask_for_shards)
            lines.append(f"one mask on all ranks, for activations that differ: {sites}")
        return "\n".join(lines)


class _Recorder(TorchDispatchMode):
    """Sees each draw: by the functions that drop, which ``watching`` wraps, and elsewhere by the operators."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.sites: dict[tuple[object, ...], Site] = {}
        self.training = True
        self.inside: Site | None = None  # of a function that drops
        self.drawn: dict[int, Site] = {}  # by storage
        self.alive: list[Tensor] = []  # so that no storage is taken for an earlier one
        self.meshes = distributed.meshes_of(model)
        self.fingerprints: dict[str, list[distributed.Fingerprint]] = {}  # one for each call, by the site's name

    def site(self) -> tuple[Site, nn.Module | None, bool]:
        """The site of the call in progress, the module that it is in, and whether it is in torch's F.dropout."""
        place: tuple[object, ...] = ()  # of the call: two on one line are two sites
        call, owner, in_torchs = "", None, False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            in_torchs = in_torchs or code in _TORCHS_CODE
            if not call and not code.co_filename.startswith(_INTERNAL):
                call = f"{Path(code.co_filename).name}:{frame.f_lineno}"
                place = code.co_filename, frame.f_lineno, frame.f_lasti
            if code.co_varnames[:1] == ("self",) and id(frame.f_locals.get("self")) in self.names:
                owner = frame.f_locals["self"]
                break
            frame = frame.f_back
        name = self.names.get(id(owner), "")
        call = call or type(owner).__name__
        return self.sites.setdefault((name, *place), Site(name, call)), owner, in_torchs

    def record(self, site: Site, p: float | None, path: str) -> None:
        site.train |= self.training
        site.eval |= not self.training
        site.path = path
        site.p = p if p is not None else site.p

    def pack(self, tensor: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # no storage
            storage = tensor.untyped_storage()
            site = self.inside or self.drawn.pop(storage._cdata, None)
            if site is not None and site.saved is not None:
                site.saved += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if self.inside is None and (namespace == "fused_dropout" or name in _DRAWS) and name != "draw_keys":
            arguments = func._schema.arguments
            given = {a.name: a.default_value for a in arguments}  # torch leaves out what is as by default: p = 0.5
            given |= dict(zip((a.name for a in arguments), args, strict=False)) | (kwargs or {})
            p = given.get("dropout", given.get("p"))
            if p == 0 or given.get("train") is False:
                return outputs
            if isinstance(p, float) and name.startswith("bernoulli"):
                p = round(1 - p, 12)
            site, owner, in_torchs = self.site()
            path = f"own code, aten::{name}"
            if isinstance(owner, nn.RNNBase):
                p, path, site.saved = owner.dropout, _OUT_OF_REACH, None
            elif namespace == "fused_dropout":
                path = _fused_path(given["key"])
            elif in_torchs or name == "native_dropout":
                path = "torch"
            self.record(site, p if isinstance(p, float) else None, path)
            for tensor in (given.get("key"), *(outputs if isinstance(outputs, tuple) else (outputs,))):
                if isinstance(tensor, Tensor):
                    self.alive.append(tensor)
                    self.drawn[tensor.untyped_storage()._cdata] = site
        return outputs

    def fingerprint_call(self, input: Any, generator: torch.Generator | None, key: Tensor | None) -> None:
        """Keeps the mask's key and a checksum of the input of this call, to compare them with those of other ranks."""
        if self.meshes and self.training and is_covered(input):
            with _disable_current_modes():
                self.fingerprints.setdefault(str(self.inside), []).append(
                    distributed.fingerprint_of(input, generator, key)
                )

    def watched(self, name: str, function: Callable[..., Tensor], fused: bool) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            input: Any = given.get("input", given.get("x"))
            p = given.get("p", given.get("drop_prob", 0.5))
            training = given.get("training", given.get("train", name not in _OFF_BY_DEFAULT))
            if self.inside is not None or not training or p == 0:
                return function(*args, **kwargs)
            self.inside, _, _ = self.site()
            takes = fused and not has_torch_function_unary(input) and is_covered(input)
            self.record(self.inside, float(p), _fused_path(input) if takes else "torch")
            knows_shard = fused and (given.get("shard") is not None or distributed.is_distributed(input))
            if not knows_shard:
                self.fingerprint_call(input, given.get("generator"), given.get("key"))
            try:
                # Not while the recorder looks on: that is a transform to the fused path, which would save otherwise.
                with _disable_current_modes() if takes else contextlib.nullcontext():
                    return function(*args, **kwargs)
            finally:
                self.inside = None

        return call

    def watched_attention(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            if self.inside is not None or p == 0:
                return function(*args, **kwargs)
            self.inside, _, _ = self.site()
            query: Any = args[0] if args else kwargs.get("query")
            on_cpu = isinstance(query, Tensor) and query.is_cpu
            takes = function is attention.scaled_dot_product_attention and is_covered(query)
            takes = takes and on_cpu and query.dtype in attention.DTYPES
            path = _fused_path(query) if takes else _OUT_OF_REACH if on_cpu else _IN_CUDA_KERNEL
            self.record(self.inside, float(p), path)
            if not (distributed.is_distributed(query) and function is attention.scaled_dot_product_attention):
                self.fingerprint_call(query, kwargs.get("generator"), kwargs.get("dropout_key"))
            saved, self.inside.saved = self.inside.saved, None
            try:
                with _disable_current_modes() if takes else contextlib.nullcontext():
                    result = function(*args, **kwargs)
                if takes and saved is not None:  # besides its inputs and its result: a key, and two numbers a row
                    self.inside.saved = saved + (16 + 8 * result[..., 0].numel()) * result.requires_grad
                return result
            finally:
                self.inside = None

        return call

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Wraps the functions that drop, wherever they are looked up at each call."""
        import fused_dropout

        meet_torchs_own()
        names = (*FAMILY, "drop_path")
        modules = (F, functional, family, fused_dropout)
        places = [(module, name) for module in modules for name in names if name in vars(module)]
        places += [(torch, name) for name in _SHORT_FORMS]
        before = {place: getattr(*place) for place in places}
        attentions = {module: getattr(module, _ATTENTION) for module in (F, fused_dropout)}
        try:
            for (module, name), function in before.items():
                function = function.func if isinstance(function, Replacement) else function
                ours = (getattr(function, "__module__", None) or "").startswith("fused_dropout")
                setattr(module, name, self.watched(name, function, ours))
            for module, function in attentions.items():
                function = function.func if isinstance(function, Replacement) else function
                setattr(module, _ATTENTION, self.watched_attention(function))
            yield
        finally:
            for module, function in attentions.items():
                setattr(module, _ATTENTION, function)
            for (module, name), function in before.items():
                setattr(module, name, function)


def _fused_path(tensor: Tensor) -> str:
    return f"fused, {backend_info().devices[tensor.device.type]}"


@contextlib.contextmanager
def _restoring(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Puts back training flags, buffers and random state."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    tensors = [t for t in (*tree_leaves(inputs), *model.parameters()) if isinstance(t, Tensor)]
    with torch.random.fork_rng(devices=sorted({t.get_device() for t in tensors if t.is_cuda})):
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)


def audit(model: nn.Module, *inputs: Any, **kwargs: Any) -> AuditReport:
    """Runs a model once in training and once in evaluation mode, and reports every site that drops.

    It sees torch's own dropout as well as the fused one, functional calls as well as modules, dropout inside
    ``nn.LSTM`` and ``scaled_dot_product_attention``, and masks that a model draws itself with ``bernoulli`` or
    ``rand``. The inputs are copied, and training flags, buffers and the random state are put back; nothing runs
    backward, so that gradients stay as they are. A compiled model runs uncompiled. While it runs, torch's dropout
    functions are wrapped for the whole process.

    Args:
        model: any module.
        inputs, kwargs: what the model is called with.

    Where parameters are DTensors, the ranks of their device meshes compare their masks and activations at the end, so
    that all have to call it.

    Returns:
        An ``AuditReport``; ``print`` it for a table. Its ``sites`` hold the module's name, the call, p, whether the
        site dropped in train and in eval, the bytes saved for backward and the path that served it.

    Raises:
        Whatever the model raises, after all was put back.

    Example::

        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return F.dropout(x, 0.1)  # without training=self.training
        >>> report = fd.audit(Model(), torch.ones(8, requires_grad=True))
        >>> [(site.p, site.train, site.eval, site.path, site.saved) for site in report.on_in_eval]
        [(0.1, True, True, 'torch', 32)]
    """
    recorder = _Recorder(model)
    with _restoring(model, (inputs, kwargs)):
        for training in (True, False):
            recorder.training = training
            model.train(training)
            args, named = tree_map_only(
                Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (inputs, kwargs)
            )
            hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor)
            with recorder.watching(), recorder, hooks, torch.set_grad_enabled(training):
                model(*args, **named)
    for name, module in model.named_modules():
        p = getattr(module, "dropout", 0) if isinstance(module, nn.RNNBase) else getattr(module, "p", 0)
        if isinstance(module, (nn.RNNBase, nn.modules.dropout._DropoutNd)) and p > 0:
            path = _OUT_OF_REACH if isinstance(module, nn.RNNBase) else "-"
            kind = type(module).__name__
            recorder.sites.setdefault((name,), Site(name, kind, p, path=path))
    for mesh in recorder.meshes:
        for dim, names in distributed.one_mask_for_shards(mesh, recorder.fingerprints).items():
            for site in recorder.sites.values():
                site.shares_mask += (dim,) * (str(site) in names)
    for site in recorder.sites.values():
        if site.path.startswith("own code") and not site.saved:
            site.saved = None  # a mask made from what was drawn is not known as one
    return AuditReport(tuple(recorder.sites.values()))
