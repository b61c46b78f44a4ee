"""The private names of torch that the core uses: each exists and has the meaning that torch_internals.py assumes.

``make test-oldest`` and ``make test-cuda`` run this under other versions of torch.
"""

import functools
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_dropout import autograd, operators
from fused_dropout import torch_internals as internals

X = torch.ones(3, 2)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


class Plain(torch.Tensor):
    pass


def seen_inside(transform, probe, *arguments):
    seen = []
    transform(lambda x: seen.append(probe()) or x.sum())(*arguments)
    return seen[0]


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_randomness_of_vmap(randomness):
    probe = internals.functorch_randomness
    assert probe() is None
    assert seen_inside(torch.func.grad, probe, X) == ""
    assert seen_inside(lambda f: torch.vmap(f, randomness=randomness), probe, X) == randomness
    nested = lambda f: torch.vmap(torch.vmap(f, randomness="same"), randomness=randomness)  # noqa: E731
    assert seen_inside(nested, probe, X) == randomness
    assert seen_inside(lambda f: torch.vmap(torch.func.grad(f), randomness=randomness), probe, X) == randomness
    assert probe() is None


def test_the_answer_is_a_constant_for_dynamo():
    """The attribute is the one that torch's own decorator sets."""

    def marked():
        return 1

    torch.compiler.assume_constant_result(marked)
    assert vars(marked).items() <= vars(internals.functorch_randomness).items()


def test_who_watches():
    assert not internals.is_watched()
    with Mode():
        assert internals.is_watched()
    with forward_ad.dual_level():
        assert internals.is_watched()
    assert seen_inside(lambda f: lambda x: torch.jit.trace(f, (x,), check_trace=False), internals.is_watched, X)
    assert not internals.is_watched()


def test_who_records():
    assert not internals.is_recorded()

    class Probe(torch.nn.Module):
        def forward(self, x):
            return x + 1 if internals.is_recorded() else x

    for strict in (False, True):
        program = torch.export.export(Probe(), (X,), strict=strict)
        assert torch.equal(program.module()(X), X + 1)
    compiled = torch.compile(Probe(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X)
    assert torch.equal(torch.jit.trace(Probe(), X)(X), X + 1)


def test_function_modes():
    assert internals.function_mode() is None
    with TorchFunctionMode() as mode:
        assert internals.function_mode() is mode


def test_subclasses():
    assert internals.wraps_tensors(X.as_subclass(Wrapper))
    assert not internals.wraps_tensors(X)
    assert not internals.wraps_tensors(X.as_subclass(Plain))
    with torch._subclasses.FakeTensorMode() as mode:
        assert internals.is_fake(mode.from_tensor(X))
    assert not internals.is_fake(X)


def test_draws_are_kept_apart():
    """AOTAutograd's list does this: it contains the operator's packet after the first traced draw."""
    from torch._functorch import compile_utils

    torch.compile(lambda x: operators.draw_keys(1, device=x.device), backend="aot_eager")(X)
    assert torch.ops.fused_dropout.draw_keys in compile_utils.rand_ops
    graph = torch.fx.Graph()
    for _ in range(2):
        graph.call_function(operators.draw_keys, (1,), {"device": X.device})
    graph.output(tuple(graph.nodes))
    assert len([n for n in compile_utils.fx_graph_cse(graph).nodes if n.op == "call_function"]) == 2
    if torch.__version__ >= "2.14":  # newer versions read the operator's tag instead
        return
    # The list is the cause: without it two draws become one.
    compile_utils.rand_ops.remove(torch.ops.fused_dropout.draw_keys)
    try:
        merged = compile_utils.fx_graph_cse(graph)
    finally:
        compile_utils.rand_ops.append(torch.ops.fused_dropout.draw_keys)
    assert len([n for n in merged.nodes if n.op == "call_function"]) == 1


def test_known_zero():
    assert internals.known_zero(0)
    assert not internals.known_zero(3)


def test_apply_without_functorch():
    x = X.clone().requires_grad_()
    apply = internals.apply_without_functorch(autograd.DropoutEager)
    y = apply(x, 0.5, torch.zeros(2, dtype=torch.uint64), 0, None, None)
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_unwrapped_constant():
    """Dynamo passes a stand-in for a mesh. tests/test_dtensors.py tests real meshes."""

    class StandIn:
        real_obj = X

    assert internals.unwrapped_constant(StandIn()) is X
    assert internals.unwrapped_constant(X) is X


def test_checkpoint_and_backward():
    def look(x):
        frame, runs = sys._getframe(1), False
        while frame:
            runs, frame = runs or internals.runs_checkpoint(frame.f_code), frame.f_back
        seen.append((runs, internals.is_in_backward()))
        return x * x

    seen = []
    look(X)
    assert seen == [(False, False)]
    for reentrant in (False, True):
        seen.clear()
        checkpoint(look, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
        assert [seen[0], seen[1][1]] == [(True, False), True]


def test_has_hooks():
    registers = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    for register in registers:
        module = torch.nn.Linear(2, 2)
        assert not internals.has_hooks(module)
        handle = getattr(module, f"register_{register}")(lambda *_: None)
        assert internals.has_hooks(module)
        handle.remove()
        assert not internals.has_hooks(module)


def test_has_global_hooks():
    hooks = torch.nn.modules.module
    registers = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    for register in registers:
        assert not internals.has_global_hooks()
        handle = getattr(hooks, f"register_module_{register}")(lambda *_: None)
        assert internals.has_global_hooks()
        handle.remove()
    assert not internals.has_global_hooks()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("original", [torch.relu, torch.nn.functional.relu6])
def test_script_as(original):
    replacement = functools.partial(len)
    internals.script_as(replacement, original)

    def f(x: torch.Tensor) -> torch.Tensor:
        return replacement(x)

    assert torch.equal(torch.jit.script(f)(X), original(X))
