"""Inductor's lowerings of the operators: ``apply`` as pointwise arithmetic, and all draws of a graph as one call.

torch.compile traces the operators as they are. Some have an overload for Inductor, and this module has its lowering:

| overload | code that Inductor generates |
|---|---|
| ``apply.<FORM>`` | the mask's arithmetic for each element, fused with its neighbours |
| ``apply.any_<FORM>`` | the same for any p, start and index strides: for ``compiled.py`` on GPUs without kernels |
| ``draw_keys.<FORM>`` | one ``draw_keys(n)`` for n draws of the graph; each row is a key |
| ``after.<FORM>`` | none: the result is x |

Inductor's cache identifies a graph by the names of its operators and not by their lowerings. So the overloads' names
contain a hash of this file, and a graph compiled by another version is never reused.

Only this module uses private names of Inductor. If one is missing, there are no lowerings: Inductor calls the overloads
as operators, and ``problem`` has the reason.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from . import __version__, reference

FORM = "inductor_" + sha256(__version__.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
problem: str | None = None  # why there are no lowerings; None if register() had no problem or has not run
_registered = False
# The name of a dictionary on Inductor's graph. "rows": the key of each draw, by node. "last": the previous draw.
_STATE = "_fused_dropout"


@contextmanager
def for_every_size() -> Iterator[None]:
    """Sets Dynamo's options for a function that is compiled once for all sizes.

    It is compiled for each dtype, device, mode and number of dimensions, which is more than the eight times that Dynamo
    allows. Sizes that are equal in the first call may differ in the next, so Dynamo must not assume that they are.
    """
    shapes: Any = torch.fx.experimental._config
    with torch._dynamo.config.patch(recompile_limit=256), shapes.patch(use_duck_shape=False):
        yield


def register_if_imported() -> None:
    """Registers the lowerings if Inductor is imported. The fake kernels call this, and run before the lowering."""
    if not _registered and "torch._inductor.lowering" in sys.modules:
        register()


def register() -> None:
    """Registers the lowerings, or sets ``problem``."""
    global problem, _registered
    problem, _registered = None, True
    try:
        _register()
    except (ImportError, AttributeError, LookupError, TypeError) as error:
        problem = f"torch.compile calls the operator as it is, and fuses nothing: {type(error).__name__}: {error}"


def _register() -> None:
    from sympy import sympify
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
    from torch._inductor.virtualized import V, ops

    operators: Any = torch.ops.fused_dropout
    int64 = torch.int64

    def number(value: int, dtype: torch.dtype = int64) -> Any:
        return ops.constant(value, dtype)

    def size(value: Any) -> Any:
        value = sympify(value)
        return number(int(value)) if value.is_number else as_int64(ops.index_expr(value, int64))

    def weighted_sum(place: Sequence[Any], start: Any, strides: Sequence[Any]) -> Any:
        for i, stride in zip(place, strides, strict=True):
            start = start + as_int64(ops.index_expr(i, int64)) * stride
        return start

    def index_of(
        x: Any, start: Any, strides: Sequence[Any], fits: bool = False
    ) -> tuple[Callable[[Sequence[Any]], Any], torch.dtype]:
        """A function for the index of an element, and the integer type for arithmetic with it.

        The indices have 32 bits if all are known to fit. Triton then sees that neighbours share a block.
        """
        known, on_cpu = V.graph.sizevars, x.get_device().type == "cpu"
        start, span = sympify(start), sum((n - 1) * stride for n, stride in zip(x.get_size(), strides, strict=True))
        fits = fits or known.statically_known_lt(start + span, 2**31)
        dense = known.statically_known_equals(span + 1, x.get_numel())

        def index(place: Sequence[Any]) -> Any:
            in_window = sum((i * stride for i, stride in zip(place, strides, strict=True)), sympify(0))
            if fits or on_cpu:
                return ops.index_expr(start + in_window, torch.int32 if fits else int64)
            # Triton may compute an expression in 32 bits if the tensor's size fits, also if start or strides do not.
            if dense:
                at = ops.index_expr(in_window, int64)
                return at if start == 0 else as_int64(at) + size(start)
            return weighted_sum(place, size(start), [size(stride) for stride in strides])

        return index, int64 if on_cpu and not fits else torch.int32

    def as_int64(value: Any) -> Any:
        return ops.to_dtype(value, int64)

    def keep(at: Any, words: Sequence[Any], bound: Any, narrow: torch.dtype, on_cpu: bool) -> Any:
        """Whether the element with this index is kept."""
        # Each constant is made once, because Inductor visits every operation about ten times, in Python.
        low, bits = number(reference.LOW_32), number(32)
        # In C++ a product beyond 2**63 is undefined, so the CPU code multiplies as reference._multiply does. On a GPU
        # the full product of two 32-bit words is one instruction.
        multipliers = [number(m - (1 << 32) if on_cpu else m) for m in reference.MULTIPLIERS]
        weyl = [number(w) for w in reference.WEYL]

        def halves(word: Any) -> list[Any]:
            return [word & low, ops.bitwise_right_shift(word, bits) & low]

        def multiply(word: Any, multiplier: Any) -> tuple[Any, Any]:
            product = word * multiplier
            high = ops.bitwise_right_shift(product, bits)
            return high + word if on_cpu else high & low, product & low

        block = as_int64(ops.bitwise_right_shift(at, number(3, narrow)))
        slot = at & number(7, narrow)
        seed, offset = words
        c0, c1, c2, c3 = *halves(offset), block & low, ops.bitwise_right_shift(block, bits)
        k0, k1 = halves(seed)
        for _ in range(reference.ROUNDS):
            high0, low0 = multiply(c0, multipliers[0])
            high1, low1 = multiply(c2, multipliers[1])
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + weyl[0]) & low, (k1 + weyl[1]) & low
        half = [slot < number(n, narrow) for n in (2, 4, 6)]
        word = ops.where(half[1], ops.where(half[0], c0, c1), ops.where(half[2], c2, c3))
        odd = as_int64(slot & number(1, narrow))
        draw = ops.bitwise_right_shift(word, ops.bitwise_left_shift(odd, number(4))) & number(0xFFFF)
        tie = c0 ^ c1 ^ c2 ^ c3 ^ word
        return (ops.bitwise_left_shift(draw, bits) | tie) < bound

    def key_of(key: Any, device: torch.device) -> Callable[[], list[Any]]:
        """A function that loads the seed and the offset."""
        key.realize()  # else Inductor inlines what computes the key, such as fold_in, for each element
        load = key.make_loader()

        def words() -> list[Any]:
            return [ops.to_dtype_bitcast(load([i]), int64, torch.uint64) for i in (0, 1)]

        if key.get_device() == device:
            return words
        # A GPU kernel takes a number on the CPU as an argument if it is a tensor without dimensions.
        numbers = [pointwise(key, int64, partial(lambda i, _: words()[i], i), []) for i in (0, 1)]
        for word in numbers:
            word.realize()
        return lambda: [word.make_loader()([]) for word in numbers]

    def pointwise(like: Any, dtype: torch.dtype, element: Callable[[Sequence[Any]], Any], shape: Sequence[Any]) -> Any:
        return ir.Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=element, ranges=list(shape))

    def product(x: Any, factor: Callable[[torch.dtype], Any]) -> Callable[[Sequence[Any]], Any]:
        """x times the factor, computed in float32 or wider and rounded once."""
        dtype, load = x.get_dtype(), x.make_loader()
        wide = torch.promote_types(dtype, torch.float32)
        return lambda place: ops.to_dtype(ops.to_dtype(load(place), wide) * factor(wide), dtype)

    def apply(x: Any, p: float, key: Any, start: Any, index_strides: Sequence[Any], scale: float | None = None) -> Any:
        dtype, on_cpu = x.get_dtype(), x.get_device().type == "cpu"
        factor = reference.scale(p) if scale is None else scale
        scaled = product(x, lambda wide: ops.constant(factor, wide))
        if p == 1:
            return pointwise(x, dtype, lambda _: ops.constant(0.0, dtype), x.get_size())
        if p == 0:
            return pointwise(x, dtype, scaled, x.get_size())
        words = key_of(key, x.get_device())
        index, narrow = index_of(x, start, index_strides)

        def element(place: Sequence[Any]) -> Any:
            kept = keep(index(place), words(), number(reference.threshold(p)), narrow, on_cpu)
            return ops.where(kept, scaled(place), ops.constant(0.0, dtype))

        return pointwise(x, dtype, element, x.get_size())

    def apply_any(x: Any, bound: Any, scale: Any, key: Any, window: Sequence[Any], fits: bool) -> Any:
        dtype, on_cpu = x.get_dtype(), x.get_device().type == "cpu"
        words = key_of(key, x.get_device())
        index, narrow = index_of(x, 0, reference.row_major(x.get_size()), fits)

        def kept(place: Sequence[Any]) -> Any:
            limit = bound.make_loader()([])
            if not window:
                return keep(index(place), words(), limit, narrow, on_cpu)
            start, *strides = (number.make_loader()([]) for number in window)
            return keep(weighted_sum(place, start, strides), words(), limit, int64, on_cpu)

        if scale is None:
            return pointwise(x, torch.bool, kept, x.get_size())
        scaled = product(x, lambda _: scale.make_loader()([]))

        def element(place: Sequence[Any]) -> Any:
            return ops.where(kept(place), scaled(place), ops.constant(0.0, dtype))

        return pointwise(x, dtype, element, x.get_size())

    def call(x: Any, p: float, key: Any, start: Any = 0, index_strides: Any = None, scale: Any = None) -> Any:
        """Calls the operator without expanding it.

        Leaves out arguments with default values. Inductor's own call passes them by name, which costs 2 us.
        """
        plain = (start, index_strides, scale) == (0, None, None) and not V.graph.cpp_wrapper
        options = {} if plain else {"start": start, "index_strides": index_strides, "scale": scale}
        return fallback_handler(operators.apply.default, add_to_fallback_set=False)(x, p, key, **options)

    def in_order(lower: Callable[[], Any]) -> Any:
        """Lowers a draw so that it runs after the previous one. Otherwise Inductor may reorder calls to save memory."""
        graph: Any = V.graph
        state, first = graph.__dict__.setdefault(_STATE, {}), len(graph.operations)
        result = lower()
        for operation in graph.operations[first:]:
            if "last" in state:
                graph.additional_buffer_deps[operation.get_operation_name()].add(state["last"])
        state["last"] = graph.operations[first].get_name()
        return result

    def draw_keys(n: Any, *, device: torch.device) -> Any:
        def draw(n: Any) -> Any:
            if V.graph.cpp_wrapper:  # its C++ code for a Device argument does not compile (torch 2.11 to 2.14)
                named = getattr(operators.draw_keys, f"named_{FORM}")
                return fallback_handler(named, add_to_fallback_set=False)(n, str(device))
            return fallback_handler(operators.draw_keys.default, add_to_fallback_set=False)(n, device=device)

        node = V.graph.current_node
        rows = V.graph.__dict__.setdefault(_STATE, {}).setdefault("rows", {})
        if node not in rows:
            run = _draws_together(node)
            if len(run) == 1:
                return in_order(lambda: draw(n))
            keys = in_order(lambda: draw(len(run)))
            rows |= {each: lowerings[torch.ops.aten.slice.Tensor](keys, 0, i, i + 1) for i, each in enumerate(run)}
        return rows[node]

    in_checkpoint = torch.ops.higher_order.run_and_save_rng_state
    lower_in_checkpoint = lowerings[in_checkpoint]

    def draw_in_checkpoint(operator: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(operator, "namespace", None) != "fused_dropout":
            return lower_in_checkpoint(operator, *args, **kwargs)
        return in_order(lambda: lower_in_checkpoint(operator, *args, **kwargs))

    lowerings[in_checkpoint] = draw_in_checkpoint

    def expand(operator: Any, lower: Callable[..., Any]) -> None:
        register_lowering(operator, type_promotion_kind=None)(lower)

    expand(operators.apply.default, call)
    expand(getattr(operators.apply, FORM), apply)
    expand(getattr(operators.apply, f"any_{FORM}"), apply_any)
    expand(getattr(operators.draw_keys, FORM), draw_keys)
    expand(getattr(operators.after, FORM), lambda x, gradient: x)


def _draws_together(first: torch.fx.Node) -> list[torch.fx.Node]:
    """The draws of one key each, from this one on, that one call can make.

    They are equal nodes, with no other operator between them that may draw random numbers.
    """
    draws, node = [first], first.next
    while node.op != "root":
        if node.target is first.target and (node.args, node.kwargs) == (first.args, first.kwargs):
            draws.append(node)
        elif node.op == "call_function" and _may_draw(node.target):
            break
        node = node.next
    return draws if first.args == (1,) else [first]


def _may_draw(target: Any) -> bool:
    """Whether the operator may draw random numbers: it is tagged as random, or belongs to an unknown library."""
    if not isinstance(target, torch._ops.OperatorBase):
        return False  # a Python function of sizes
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return True
    return target.namespace not in ("aten", "prims", "fused_dropout") or "seed" in target.name()
