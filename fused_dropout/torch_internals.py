"""All uses of private names of torch, except those of Inductor (in ``inductor.py``) and DTensor (``distributed.py``).

Each docstring says what happens if a version of torch lacks the names. ``tests/test_internals.py`` checks all functions
under each tested version of torch. Modules of every layer import this one.
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
    """Whether torch.export or torch.jit.trace records a graph, which has to run without this package.

    Does not use torch.compiler.is_exporting(), which Dynamo replaces by True whenever it compiles (torch 2.11). If the
    names are missing, the first call in Python raises AttributeError.
    """
    return torch.compiler._is_exporting_flag or (not is_compiling() and torch._C._get_tracing_state() is not None)


def constant_while_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes Dynamo call the function while it traces, and use the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports Dynamo. If torch no longer reads the attribute,
    Dynamo refuses to trace the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def unwrapped_constant(x: Any) -> Any:
    """The object behind the proxy that Dynamo passes for an opaque argument of a ``constant_while_tracing`` function.

    If the attribute is missing, x is no proxy and is returned.
    """
    return getattr(x, "real_obj", x)


@constant_while_tracing
def functorch_randomness() -> str | None:
    """The strictest ``randomness`` of the active vmaps: "error", "different", "same", or "" without a vmap.

    None outside of torch.func's transforms. The result is right while Dynamo traces too, because Dynamo enters the
    transforms. If the names are missing, the first call under a transform raises AttributeError or ImportError.
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

    Dynamo makes a guard of the first condition. The other two are false while it compiles. If the names are missing,
    the first call in Python raises AttributeError.
    """
    return forward_ad._current_level >= 0 or (
        not is_compiling() and (torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None)
    )


def function_mode() -> Any:
    """The innermost torch_function mode, or None. If the name is missing, the first call raises ImportError."""
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode()


def is_fake(x: object) -> bool:
    """Whether x is a fake tensor, which has a shape and no values.

    If the class is missing, the result is False, and fake tensors are handled as other subclasses are.
    """
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(x, module.FakeTensor)


def is_distributed(x: object) -> bool:
    """Whether x is a DTensor. Does not import the class."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_traced_ahead(x: object) -> bool:
    """Whether AOTAutograd traces x inside a function of torch that Dynamo did not trace, such as multi-head attention.

    There ``is_compiling`` is True only in later versions of torch. If the class is missing, such calls go to torch's
    own function, and their masks differ from those of eager mode.
    """
    module = sys.modules.get("torch._subclasses.functional_tensor")
    return module is not None and isinstance(x, module.FunctionalTensor) and forward_ad._current_level < 0


def wraps_tensors(x: Tensor) -> bool:
    """Whether x has a subclass that handles operations (``__torch_dispatch__``) and not functions.

    If ``_disabled_torch_function_impl`` is missing, the first call with a subclass raises AttributeError.
    """
    kind: Any = type(x)
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    default: Any = Tensor.__torch_function__
    own = kind.__torch_function__
    return own is torch._C._disabled_torch_function_impl or getattr(own, "__func__", None) is default.__func__


def known_zero(n: Any) -> bool:
    """Whether a size is known to be 0. Only for compilers: the import of sympy takes a second."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(n == 0)


def keep_draws_apart(draw: Any) -> None:
    """Keeps AOTAutograd from merging two draws as a common subexpression.

    A merge would give two dropouts of a compiled block the same mask. Up to torch 2.13 AOTAutograd uses its own list of
    random operators, and not the operator's tag. If the list is missing, this does nothing;
    ``test_two_dropouts_of_one_tensor_differ`` fails if the list was still needed.
    """
    from torch._functorch import compile_utils

    if draw not in getattr(compile_utils, "rand_ops", [draw]):
        compile_utils.rand_ops.append(draw)


def apply_without_functorch(function: type[torch.autograd.Function]) -> Any:
    """``Function.apply`` without its support for torch.func, which takes 15 us a call to bind the arguments.

    If the base class has no ``apply``, the import of ``autograd`` fails.
    """
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def script_as(replacement: Any, original: Any) -> None:
    """Makes torch.jit.script compile ``original`` in place of ``replacement``. Scripting is deprecated.

    If the names are missing, torch.jit.script cannot compile code that calls a patched function.
    """
    with suppress(AttributeError):
        operator = torch.jit._builtins._find_builtin(original)
        if operator is not None:
            torch.jit._builtins._register_builtin(replacement, operator)
            return
        # With this entry TorchScript compiles one of two functions, depending on a flag. Both are the original, and the
        # flag is an argument that no call has.
        either = {"if_true": original, "if_false": original, "index": 99, "arg_name": "", "default": False}
        torch._jit_internal.boolean_dispatched[replacement] = either | {"func_name": original.__name__}


def runs_checkpoint(code: CodeType) -> bool:
    """Whether this code is the function of torch.utils.checkpoint that runs a block.

    If torch renames the function, audit shows 0 B instead of "checkpointed".
    """
    return code.co_filename.endswith(_CHECKPOINT) and code.co_name in ("checkpoint", "forward")


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass. If the name is missing, the first audit raises AttributeError."""
    return torch._C._current_graph_task_id() != -1


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether the module has its own hooks, which see its input or output.

    If a name is missing, the first call of a paired layer raises AttributeError.
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether there are global module hooks. If the name is missing, the first call of a fused layer raises
    AttributeError.
    """
    return bool(torch.nn.modules.module._has_any_global_hook())
