"""Every private name of torch that the core uses, but for Inductor's and DTensor's, which stand in ``inductor.py`` and
``distributed.py``.

Each function says what it is for and what happens when torch no longer has the name. ``tests/test_internals.py`` goes
through all of them under each version of torch that is tested.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

is_compiling = torch.compiler.is_compiling
_CHECKPOINT = str(Path("torch", "utils", "checkpoint.py"))


def is_recorded() -> bool:
    """Whether torch.export or torch.jit.trace records a graph, which is to be run without this package.

    Not torch.compiler.is_exporting(): Dynamo takes that for true whenever it compiles (torch 2.11). Without these names
    the first call in Python raises AttributeError.
    """
    return torch.compiler._is_exporting_flag or (not is_compiling() and torch._C._get_tracing_state() is not None)


def constant_while_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets Dynamo call the function while it traces, and take the result for a constant, without looking inside.

    ``torch.compiler.assume_constant_result`` does the same, but imports Dynamo. Without the attribute Dynamo refuses to
    trace the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def unwrapped_constant(x: Any) -> Any:
    """The object itself, where Dynamo hands a function that it takes for a constant a stand-in of an opaque argument.
    Without the attribute there is none."""
    return getattr(x, "real_obj", x)


@constant_while_tracing
def functorch_randomness() -> str | None:
    """None outside of torch.func's transforms; else the strictest ``randomness`` of the vmaps that are active: "error",
    "different", "same", or "" if there is no vmap.

    Dynamo enters the transforms that it traces, so the answer while tracing is right. Without these names the first
    call under a transform raises AttributeError or ImportError.
    """
    if not torch._C._are_functorch_transforms_active():
        return None
    from torch._C._functorch import CVmapInterpreterPtr, TransformType, get_interpreter_stack

    strictest = ""
    for level in get_interpreter_stack() or ():
        if level.key() == TransformType.Vmap:
            mode = CVmapInterpreterPtr(level).randomness().name.lower()
            strictest = max(strictest, mode, key=("", "same", "different", "error").index)
    return strictest


def is_watched() -> bool:
    """Whether forward-mode AD, a dispatch mode or torch.jit.trace sees each operation.

    Dynamo traces the first, of which it makes a guard; the others are not there while it compiles. Without these names
    the first call in Python raises AttributeError.
    """
    return forward_ad._current_level >= 0 or (
        not is_compiling() and (torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None)
    )


def function_mode() -> Any:
    """The innermost torch_function mode, or None. Without the name the first call raises ImportError."""
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode()


def is_fake(x: object) -> bool:
    """Whether x has a shape and no values. Without the class nothing is taken for fake, and fake tensors go the way of
    other subclasses."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(x, module.FakeTensor)


def is_distributed(x: object) -> bool:
    """Whether x is a DTensor. The class is not imported for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_traced_ahead(x: object) -> bool:
    """Whether AOTAutograd traces x, inside a function of torch that Dynamo left whole, such as multi-head attention.
    ``is_compiling`` says so only in later versions. Without the class such calls go to torch's own function, and their
    masks are not eager's."""
    module = sys.modules.get("torch._subclasses.functional_tensor")
    return module is not None and isinstance(x, module.FunctionalTensor) and forward_ad._current_level < 0


def wraps_tensors(x: Tensor) -> bool:
    """Whether x is of a subclass that sees each operation (``__torch_dispatch__``), and leaves functions alone. Without
    the name for a subclass that sees no functions the first call with a subclass raises AttributeError."""
    kind: Any = type(x)
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    default: Any = Tensor.__torch_function__
    own = kind.__torch_function__
    return own is torch._C._disabled_torch_function_impl or getattr(own, "__func__", None) is default.__func__


def known_zero(n: Any) -> bool:
    """Whether a size is 0, as far as a compiler knows. Takes a second to import, with sympy: for compilers only."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(n == 0)


def keep_draws_apart(draw: Any) -> None:
    """Keeps AOTAutograd from merging two draws as a common subexpression, which would give two dropouts of a compiled
    block one mask. Up to torch 2.13 it goes by this list of its own, not by the operator's tag.

    Without the list nothing is done here; ``test_two_dropouts_of_one_tensor_differ`` fails if that is wrong.
    """
    from torch._functorch import compile_utils

    if draw not in getattr(compile_utils, "rand_ops", [draw]):
        compile_utils.rand_ops.append(draw)


def apply_without_functorch(function: type[torch.autograd.Function]) -> Any:
    """``Function.apply`` less what it does for torch.func: binding the arguments by their signature takes it 15 us a
    call. Without the base class's ``apply`` the import of ``autograd`` fails."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def script_as(replacement: Any, original: Any) -> None:
    """Lets torch.jit.script compile ``original`` in place of ``replacement``. Scripting is deprecated. Without these
    names it cannot compile code that calls a patched function."""
    with suppress(AttributeError):
        operator = torch.jit._builtins._find_builtin(original)
        if operator is not None:
            torch.jit._builtins._register_builtin(replacement, operator)
            return
        # TorchScript compiles one of two functions here, by the value of a flag. Both are the original, and the flag is
        # an argument that no call has.
        either = {"if_true": original, "if_false": original, "index": 99, "arg_name": "", "default": False}
        torch._jit_internal.boolean_dispatched[replacement] = either | {"func_name": original.__name__}


def runs_checkpoint(code: CodeType) -> bool:
    """Whether this code is the function of torch.utils.checkpoint that runs a block. If torch renames it, audit shows
    0 B in place of "checkpointed"."""
    return code.co_filename.endswith(_CHECKPOINT) and code.co_name in ("checkpoint", "forward")


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass. Without the name the first audit raises AttributeError."""
    return torch._C._current_graph_task_id() != -1


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether the module has hooks of its own, which see its input or output. Without a name the first call of a paired
    layer raises AttributeError."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules. Without the name the first call of a fused layer raises
    AttributeError."""
    return bool(torch.nn.modules.module._has_any_global_hook())
