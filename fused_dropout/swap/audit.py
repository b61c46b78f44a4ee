"""``audit``: finds every place where a model drops, by one forward pass in training and one in evaluation mode.

It uses ``convert.py`` and ``patching.py`` to say what they would fuse, and ``audit_report.py`` for the result.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.overrides import has_torch_function_unary
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import attention, distributed, family, functional, linear, neighbours
from ..arguments import check_module
from ..build_info import backend_info
from ..dispatch import is_covered
from ..torch_internals import is_in_backward, runs_checkpoint
from . import pairing
from .audit_report import OUT_OF_REACH, AuditReport, Site, torchs_mask
from .convert import convert_report
from .patching import FAMILY, cache_overridable_functions, unpatched

_INTERNAL = tuple(str(Path(module.__file__ or "").parent) + "/" for module in (torch, functional))
_SHORT_FORMS = [name for name in vars(torch) if name.rstrip("_") in (*FAMILY, "feature_dropout")]
_TORCHS_CODE: set[CodeType | None] = {getattr(getattr(F, name), "__code__", None) for name in FAMILY}
_DRAWS = {"bernoulli", "bernoulli_", "native_dropout", "rand", "rand_like", "uniform_", "_cudnn_rnn", "miopen_rnn"}
_OFF_BY_DEFAULT = {"alpha_dropout", "feature_alpha_dropout", "drop_path"}
_ARGUMENTS = {
    "dropout_add": ("input", "residual", "p", "training"),
    "dropout_linear": ("input", "weight", "bias", "p", "training"),
}
_ATTENTION = "scaled_dot_product_attention"
_IN_CUDA_KERNEL = f"{OUT_OF_REACH}: p in steps of 1/256"  # torch's flash attention draws 8 bits


class _Place(NamedTuple):
    """The place of the current call in the user's code.

    key: the same for all calls of one site. line: file and line of the user's code. owner: the module whose method
    makes the call. in_torchs: whether the call is inside torch's F.dropout. checkpointed: whether it is inside a
    checkpoint.
    """

    key: tuple[object, ...]
    line: str
    owner: nn.Module | None
    in_torchs: bool
    checkpointed: bool


def _place_of(names: dict[int, str]) -> _Place:
    """Finds the place on the call stack. names: the names of the model's modules, by id."""
    line, owner, in_torchs, checkpointed = "", None, False, False
    key: tuple[object, ...] = ()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if owner is None:
            in_torchs = in_torchs or code in _TORCHS_CODE
            if not line and not code.co_filename.startswith(_INTERNAL):
                line = f"{Path(code.co_filename).name}:{frame.f_lineno}"
                key = code.co_filename, frame.f_lineno
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            owner = first if id(first) in names or isinstance(first, nn.RNNBase) else None
        checkpointed = checkpointed or runs_checkpoint(code)
        frame = frame.f_back
    return _Place(
        (names.get(id(owner), "(function)"), *key), line or type(owner).__name__, owner, in_torchs, checkpointed
    )


class _Recorder(TorchDispatchMode):
    """Records each place that drops.

    ``watching`` wraps the functions that drop. Draws outside of them are seen as operators, by the dispatch mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.sites: dict[tuple[object, ...], Site] = {}
        self.training = True
        self.inside: Site | None = None  # the site of the wrapped function that runs now
        self.packed: dict[int, int] = {}  # the bytes that this function has saved for backward, by storage
        self.drawn: dict[int, Site] = {}  # the site of each random tensor drawn elsewhere, by storage
        self.alive: list[Tensor] = []  # keeps the storages alive, so that none gets the address of an earlier one
        self.meshes = distributed.meshes_of(model)
        self.fingerprints: dict[str, list[distributed.Fingerprint]] = {}  # one for each call, by the site's name

    def record(self, place: _Place, p: float | None, path: str) -> Site:
        key = place.key if len(place.key) == 1 else (*place.key, p)  # two dropouts on one line may have different rates
        site = self.sites.setdefault(key, Site(str(place.key[0]), place.line))
        if self.training or not site.train:
            site.times += 1
        site.train |= self.training
        site.eval |= not self.training
        site.checkpointed |= self.training and place.checkpointed
        site.path = path
        site.p = p if p is not None else site.p
        return site

    def pack(self, tensor: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # no storage
            storage = tensor.untyped_storage()
            if self.inside is not None:
                self.packed[storage._cdata] = storage.nbytes()
                self.alive.append(tensor)
            elif self.training and (site := self.drawn.pop(storage._cdata, None)) and site.saved is not None:
                site.saved += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        draws = (namespace == "fused_dropout" and name != "draw_keys") or name in _DRAWS
        if draws and self.inside is None and not is_in_backward():
            arguments = func._schema.arguments
            given = {a.name: a.default_value for a in arguments}  # torch leaves out arguments with their default value
            given |= dict(zip((a.name for a in arguments), args, strict=False)) | (kwargs or {})
            p = given.get("dropout", given.get("p"))
            if p == 0 or given.get("train") is False:
                return outputs
            place = _place_of(self.names)
            if isinstance(p, float) and name.startswith("bernoulli"):
                p = round(1 - p, 12)
            path = f"own code, aten::{name}"
            if isinstance(place.owner, nn.RNNBase):
                p, path = place.owner.dropout, OUT_OF_REACH
            elif namespace == "fused_dropout":
                path = _fused_path(given["key"])
            elif place.in_torchs or name == "native_dropout":
                path = "torch"
            site = self.record(place, p if isinstance(p, float) else None, path)
            if path == OUT_OF_REACH or namespace == "fused_dropout":
                site.saved = None  # unknown, because more is saved under a dispatch mode than without it
            for tensor in (given.get("key"), *(outputs if isinstance(outputs, tuple) else (outputs,))):
                if isinstance(tensor, Tensor):
                    self.alive.append(tensor)
                    self.drawn[tensor.untyped_storage()._cdata] = site
        return outputs

    def fingerprint_call(self, input: Any, generator: torch.Generator | None, key: Tensor | None) -> None:
        """Stores the key and checksums of the input of this call, to compare them with those of other ranks."""
        if self.meshes and self.training and is_covered(input):
            with _disable_current_modes():
                self.fingerprints.setdefault(str(self.inside), []).append(
                    distributed.fingerprint_of(input, generator, key)
                )

    def watched(self, name: str, function: Callable[..., Tensor], fused: bool) -> Callable[..., Tensor]:
        names = _ARGUMENTS.get(name, ("input", "p", "training"))

        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = dict(zip(names, args, strict=False)) | kwargs
            input: Any = given.get("input", given.get("x"))
            p = given.get("p", given.get("drop_prob", 0.5))
            training = given.get("training", given.get("train", name not in _OFF_BY_DEFAULT))
            if self.inside is not None or not training or p == 0:
                return function(*args, **kwargs)
            plain = not has_torch_function_unary(input) and is_covered(input)
            takes = fused and plain
            # The recorder is a dispatch mode. Under a mode the call would be composed of torch's operations, which save
            # a mask.
            modes = _disable_current_modes() if takes else contextlib.nullcontext()
            if is_in_backward():  # a checkpoint runs its block again: not a new call
                with modes:
                    return function(*args, **kwargs)
            place = _place_of(self.names)
            site = self.inside = self.record(place, float(p), _fused_path(input) if takes else "torch")
            site.reached_by = ("patch",) if plain and not fused else ()
            knows_shard = fused and (given.get("shard") is not None or distributed.is_distributed(input))
            if not knows_shard:
                self.fingerprint_call(input, given.get("generator"), given.get("key"))
            self.packed.clear()
            try:
                with modes:
                    result = function(*args, **kwargs)
            finally:
                self.inside = None
            if self.training and site.saved is not None:
                for tensor in (*args, *kwargs.values(), result):
                    if isinstance(tensor, Tensor) and self.packed:
                        self.packed.pop(tensor.untyped_storage()._cdata, None)
                site.saved += sum(self.packed.values())
                if takes and input.requires_grad and torch.is_grad_enabled() and not place.checkpointed:
                    site.torch_saved += torchs_mask(name, input, given.get("noise_shape"))
            return result

        return call

    def watched_attention(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            if self.inside is not None or p == 0:
                return function(*args, **kwargs)
            query: Any = args[0] if args else kwargs.get("query")
            on_cpu = isinstance(query, Tensor) and query.is_cpu
            reached = on_cpu and is_covered(query) and query.dtype in attention.DTYPES
            ours = function is attention.scaled_dot_product_attention
            takes = reached and ours
            modes = _disable_current_modes() if takes else contextlib.nullcontext()
            if is_in_backward():
                with modes:
                    return function(*args, **kwargs)
            path = OUT_OF_REACH if on_cpu else _IN_CUDA_KERNEL
            if reached:
                path = _fused_path(query) if ours else "torch"
            place = _place_of(self.names)
            site = self.inside = self.record(place, float(p), path)
            site.reached_by = ("patch",) if reached and not ours else ()
            if not (distributed.is_distributed(query) and ours):
                self.fingerprint_call(query, kwargs.get("generator"), kwargs.get("dropout_key"))
            try:
                with modes:
                    result = function(*args, **kwargs)
            finally:
                self.inside = None
            if not takes:
                site.saved = None
            elif site.saved is not None and result.requires_grad and self.training and not place.checkpointed:
                site.saved += 16 + 8 * result[..., 0].numel()  # the key, and two float32 numbers for each row
                keys: Any = args[1] if len(args) > 1 else kwargs["key"]
                site.torch_saved += query[..., 0].numel() * keys.shape[-2] * query.itemsize
            return result

        return call

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Wraps the functions that drop, in every module that looks them up at each call."""
        import fused_dropout

        cache_overridable_functions()
        names = (*FAMILY, "drop_path", "dropout_add", "relu_dropout", "dropout_linear")
        modules = [F, functional, family, fused_dropout, neighbours, linear, pairing]
        modules += [sys.modules[name] for name in ("fused_dropout.swap.fusing",) if name in sys.modules]
        places = [(module, name) for module in modules for name in names if name in vars(module)]
        places += [(torch, name) for name in _SHORT_FORMS]
        before = {place: getattr(*place) for place in places}
        attentions = {module: getattr(module, _ATTENTION) for module in (F, fused_dropout)}
        try:
            for (module, name), function in before.items():
                function = unpatched(function)
                ours = (getattr(function, "__module__", None) or "").startswith("fused_dropout")
                setattr(module, name, self.watched(name, function, ours))
            for module, function in attentions.items():
                setattr(module, _ATTENTION, self.watched_attention(unpatched(function)))
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
    """Restores training flags, buffers, gradients and random state at the end."""
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    buffers = [(m, name, b, b if b is None else b.clone()) for m in modules for name, b in m._buffers.items()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    values = (*tree_leaves(inputs), *(value for module in modules for value in vars(module).values()))
    generators = {id(g): (g, g.get_state()) for g in values if isinstance(g, Generator)}
    tensors = [t for t in (*tree_leaves(inputs), *model.parameters()) if isinstance(t, Tensor)]
    pythons = random.getstate()
    with torch.random.fork_rng(devices=sorted({t.get_device() for t in tensors if t.is_cuda})):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            random.setstate(pythons)
            for generator, state in generators.values():
                generator.set_state(state)
            for module, training in flags:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer if buffer is None or value is None else buffer.copy_(value)


def _module_of(function: Any) -> nn.Module | None:
    """The module that a bound method belongs to."""
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _add_idle_modules(model: nn.Module, layers: Collection[str], sites: dict[tuple[object, ...], Site]) -> None:
    """Adds sites for the modules that have a drop rate and never dropped.

    layers: the names of the fused layers. These drop in place of the dropouts inside them, which get no site.
    """
    for name, module in model.named_modules():
        is_rnn = isinstance(module, nn.RNNBase)
        p = module.dropout * (module.num_layers > 1) if is_rnn else getattr(module, "p", 0)
        in_layer = name.rpartition(".")[0] in layers or type(module) is pairing.PairedDropout
        if (is_rnn or isinstance(module, nn.modules.dropout._DropoutNd)) and p > 0 and not in_layer:
            path = OUT_OF_REACH if is_rnn else "-"
            sites.setdefault((name,), Site(name, type(module).__name__, p, path=path))


def audit(model: Any, /, *inputs: Any, of: nn.Module | None = None, **kwargs: Any) -> AuditReport:
    """Runs a model once in training and once in evaluation mode, and reports every place that drops.

    In PyTorch: a ``TorchDispatchMode`` and ``torch.autograd.graph.saved_tensors_hooks`` around ``model(*inputs)``.

    The report includes torch's own and fused dropout, functional calls and modules, dropout inside ``nn.LSTM`` and
    ``scaled_dot_product_attention``, and masks that the model draws with ``bernoulli`` or ``rand``. A compiled model
    runs uncompiled. During the call torch's dropout functions are wrapped in the whole process.

    The inputs are copied. At the end ``audit`` restores training flags, gradients, buffers (such as the running
    statistics of batch normalization), the random state of torch and Python, and the generators of modules, also if the
    model raises an error. Other changes stay: parameters that a training step updates, logs, attributes. ``audit``
    itself does not run backward, but a function such as a training step may.

    If parameters are DTensors, the ranks of their device meshes compare masks and activations at the end, so all ranks
    have to call ``audit``.

    Args:
        model: any module, or a function that calls one, such as ``lightning_module.training_step``. For a bound method
            of a module the module is known; for another function give it as ``of``.
        inputs: the positional arguments of the model.
        of: the module that the function calls. Without it an unbound function runs once, in the mode that its modules
            have, and sites have no names.
        kwargs: the keyword arguments of the model.

    Returns:
        A report; ``print`` it for a table. Its first line says how many sites are fused, and the bytes kept for
        backward with torch's dropout and now. Its last line says what to call next.

    Raises:
        TypeError: ``model`` is neither a module nor a function; ``of`` is not a module.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return F.dropout(x, 0.1)  # without training=self.training
        >>> report = fd.audit(Model(), torch.ones(8, requires_grad=True))
        >>> [(site.p, site.train, site.eval, site.path, site.saved) for site in report.on_in_eval]
        [(0.1, True, True, 'torch', 32)]
        >>> report.summary
        '0 of 1 site fused, 32 B kept for backward'
        >>> report.advice
        'next: fd.patch() would fuse 1 of these sites'
    """
    if not callable(model):
        raise TypeError(f"model has to be an nn.Module or a function, but is {model!r}")
    if of is not None:
        check_module(of)
    module = of if of is not None else model if isinstance(model, nn.Module) else _module_of(model)
    evaluated = module is not None
    if module is None:
        module = nn.Module()
    recorder = _Recorder(module)
    with _restoring(module, (inputs, kwargs)):
        for training in (True, False) if evaluated else (True,):
            recorder.training = training
            module.train(training)
            args, named = tree_map_only(
                Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (inputs, kwargs)
            )
            hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor)
            # A function, such as a training step, may run backward and so needs gradients.
            grad = torch.set_grad_enabled(training or not isinstance(model, nn.Module))
            with recorder.watching(), recorder, hooks, grad, torch.compiler.set_stance("force_eager"):
                model(*args, **named)
    report = convert_report(module)
    _add_idle_modules(module, report.layers, recorder.sites)
    for mesh in recorder.meshes:
        for dim, names in distributed.one_mask_for_shards(mesh, recorder.fingerprints).items():
            for site in recorder.sites.values():
                site.shares_mask += (dim,) * (str(site) in names)
    for site in recorder.sites.values():
        own = site.path.startswith("own code")
        if own and not site.saved:
            site.saved = None  # unknown, because the mask is computed from the draw and not recognized
        if not site.fused:
            site.torch_saved = site.saved or 0
        if site.module in report.torch and (own or site.reached_by):
            site.reached_by = ("convert", *site.reached_by)
    return AuditReport(tuple(recorder.sites.values()), evaluated)
