"""Rewrites the source of a layer's forward so that it calls fused functions, for ``fusing.py``.

There is no list of supported classes. This module reads the source of a forward, and rewrites these forms:

    r + self.dropout(x)              to dropout_add; also if the sum is in the next statement
    r + self.method(...)             the same, if the method returns self.dropout(x)
    y = self.layer(...); z = r + y   the same, if the layer's forward returns self.dropout(x), alone or first in a tuple
    self.dropout(self.act(x))        to relu_dropout, if act is ReLU; also as two statements

The new code computes the same in the same order. It calls methods of ``fusing.FusedLayer``, which check in each call
whether the modules can be fused. The rest of the forward, with its line numbers, does not change. A source is used only
if it compiles to the code that runs.
"""

import __future__

import ast
import copy
import functools
import inspect
import linecache
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeGuard

from torch import nn

_LIBRARIES = ("torch.nn.", "transformers.", "timm.")
_DECORATORS = ("deprecate_kwarg",)  # decorators that can be applied to the new function too
_CHECKPOINTING = ("transformers.modeling_layers", "forward_with_checkpointing")  # wraps the forward of each subclass
_DROPOUT, _ACTIVATION = ("drop",), ("act", "relu")  # a module is a candidate if its name contains one of these
_UNDROPPED = "_fused_dropout_undropped_"
NO_FORM = "no known form of a sum or a ReLU next to its dropout"


class UnusableSource(Exception):
    """Why the source of a method cannot be rewritten."""


class Undropped(NamedTuple):
    """A method without the dropout at its end.

    function: the method without the dropout. dropout: the dropout's name. in_tuple: whether the method returns a tuple,
    of which the dropped tensor is the first. source: the method as it was.
    """

    function: Callable[..., Any]
    dropout: str
    in_tuple: bool
    source: Any


class Site(NamedTuple):
    """A rewritten place in a forward, with the names of its modules.

    function: the fused function that is called there if possible. layer: the inner layer whose forward ends with a
    dropout. in_tuple: whether that forward returns a tuple.
    """

    function: str
    dropout: str = ""
    activation: str = ""
    layer: str = ""
    in_tuple: bool = False


class Rewritten(NamedTuple):
    """The rewritten forward of a class.

    methods: the methods without the dropout at their ends, by their new names. sites: the rewritten places. sources:
    the functions that were read, by name.
    """

    forward: Callable[..., Any]
    methods: dict[str, Callable[..., Any]]
    sites: list[Site]
    sources: dict[str, Any]


@functools.cache
def is_known(kind: Any) -> bool:
    """Whether a class and all its base classes up to nn.Module belong to the libraries."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return all(base.__module__.startswith(_LIBRARIES) for base in bases)


def _same_code(a: Any, b: Any) -> bool:
    if not isinstance(a, CodeType) or not isinstance(b, CodeType):
        return repr(a) == repr(b) or (isinstance(a, frozenset) and a == b)
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    same = all(getattr(a, part) == getattr(b, part) for part in parts) and len(a.co_consts) == len(b.co_consts)
    return same and all(map(_same_code, a.co_consts, b.co_consts))


class _File(NamedTuple):
    """A file's functions, by name and first line (with decorators), and its imports outside of functions."""

    functions: dict[tuple[str, int], ast.FunctionDef]
    imports: list[ast.stmt]


@functools.lru_cache(8)
def _parse(lines: str) -> _File:
    tree = ast.parse(lines)
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    by_line = {(f.name, min([f.lineno, *(d.lineno for d in f.decorator_list)])): f for f in functions}
    return _File(by_line, list(_imports(tree.body)))


def _imports(statements: Iterable[Any]) -> Iterator[ast.stmt]:
    for node in statements:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from _imports(getattr(node, part, ()))


def _file_of(function: FunctionType) -> _File:
    return _parse("".join(linecache.getlines(function.__code__.co_filename, function.__globals__)))


def _code_of(tree: ast.FunctionDef, function: FunctionType) -> CodeType:
    """Compiles a source as Python did in its file, with the imports and the class around it, which change the code."""
    fields = {name: getattr(tree, name) for name in tree._fields} | {"decorator_list": []}
    node: Any = ast.copy_location(ast.FunctionDef(**fields), tree)
    classes = [name for name in function.__qualname__.split(".")[:-1] if name != "<locals>"]
    for name in reversed(classes):
        body: Any = ast.parse(f"class {name}: pass").body[0]
        body.body = [node]
        node = ast.copy_location(body, tree)
    module = ast.fix_missing_locations(ast.Module([*_file_of(function).imports, node], []))
    future = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(module, function.__code__.co_filename, "exec", future, dont_inherit=True)
    for name in (*classes, tree.name):
        code = next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)
    return code


def _read(kind: type, name: str) -> tuple[ast.FunctionDef, FunctionType]:
    """Returns the source of a method, and the function without its decorators.

    Raises:
        UnusableSource: the source is missing, or is not what runs, or has something that cannot be rewritten.
    """
    owner = next(base for base in kind.__mro__ if name in vars(base))
    function, wrappers = vars(owner)[name], []
    while hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    full_name = f"{owner.__name__}.{name}"
    if not isinstance(function, FunctionType) or function.__globals__.get("__name__") != owner.__module__:
        raise UnusableSource(f"{full_name} was replaced")
    if function.__code__.co_freevars:
        raise UnusableSource(f"{full_name} uses super() or another closure")
    place = function.__name__, function.__code__.co_firstlineno
    try:
        tree = copy.deepcopy(_file_of(function).functions[place])
    except (KeyError, SyntaxError):
        raise UnusableSource(f"{full_name} has no source") from None
    if not _same_code(_code_of(tree, function), function.__code__):
        raise UnusableSource(f"the source of {full_name} is not what runs")
    for decorator in tree.decorator_list:
        if not isinstance(decorator, ast.Call) or _name(decorator.func) not in _DECORATORS:
            raise UnusableSource(f"{full_name} is decorated with {ast.unparse(decorator)}")
    decorators = [function.__globals__[_name(call.func)].__module__ for call in tree.decorator_list]  # type: ignore[attr-defined]
    if [module for module, name in map(_origin, wrappers) if (module, name) != _CHECKPOINTING] != decorators:
        raise UnusableSource(f"{full_name} is wrapped in another function")
    return tree, function


def _origin(wrapper: Any) -> tuple[str, str]:
    """The module and the name in a function's definition. ``functools.wraps`` sets other ones on the function."""
    function = getattr(wrapper, "__func__", wrapper)
    return function.__globals__["__name__"], function.__code__.co_name


def _compile(tree: ast.FunctionDef, function: FunctionType) -> Any:
    """Makes a function of a changed source."""
    made: Any = FunctionType(_code_of(tree, function), function.__globals__, tree.name, function.__defaults__)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    for decorator in reversed(tree.decorator_list):
        made = eval(compile(ast.Expression(decorator), "<decorator>", "eval"), function.__globals__)(made)
    return made


def _member(node: ast.AST, parts: Iterable[str] = ("",)) -> str:
    """The name in ``self.name``, if it contains one of the parts; else the empty string."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr if any(part in node.attr.lower() for part in parts) else ""
    return ""


def _called(node: ast.AST, parts: Iterable[str]) -> TypeGuard[ast.Call]:
    """Whether the node is ``self.name(x)``, and the name contains one of the parts."""
    if not isinstance(node, ast.Call) or not _member(node.func, parts):
        return False
    return len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _target(statement: ast.stmt | None) -> str:
    """The name x in ``x = ...`` and in ``x, y = ...``; else the empty string."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return ""
    target = statement.targets[0]
    return _name(target.elts[0] if isinstance(target, ast.Tuple) and target.elts else target)


def _loads(node: ast.AST, name: str) -> int:
    """How often a name is read."""
    return sum(_name(n) == name and isinstance(getattr(n, "ctx", None), ast.Load) for n in ast.walk(node))


@functools.cache
def undropped(kind: Any, name: str, source: Any) -> Undropped | None:
    """The method of a class without the dropout at its end; None if there is no such dropout."""
    try:
        tree, function = _read(kind, name)
        found = _remove_last_dropout(tree)
        return found and Undropped(_compile(tree, function), *found, source)
    except UnusableSource:
        return None


def _remove_last_dropout(tree: ast.FunctionDef) -> tuple[str, bool] | None:
    """Removes the dropout at the end of a function, in place.

    Returns its name, and whether the function returns a tuple. None if there is no such dropout.
    """
    *_, before, last = None, *tree.body
    if not isinstance(last, ast.Return) or sum(isinstance(node, ast.Return) for node in ast.walk(tree)) != 1:
        return None
    if last.value is not None and _called(call := last.value, _DROPOUT):
        last.value = call.args[0]
        return _member(call.func), False
    # x = self.dropout(...), then return x, or return x, y
    in_tuple = isinstance(last.value, ast.Tuple)
    names = [_name(node) for node in getattr(last.value, "elts", [last.value])]
    if not isinstance(before, ast.Assign) or not _called(call := before.value, _DROPOUT):
        return None
    if isinstance(before.targets[0], ast.Tuple) or not _target(before) or not all(names):
        return None
    if names[0] != _target(before) or names.count(names[0]) != 1:
        return None
    before.value = call.args[0]
    return _member(call.func), in_tuple


class _Rewriter(ast.NodeTransformer):
    """Rewrites the forms in the module's docstring, in place, and collects the places."""

    def __init__(self, kind: type, tree: ast.FunctionDef) -> None:
        self.kind, self.tree = kind, tree
        self.sites: list[Site] = []
        # For each method: its dropout, the method, the method without the dropout.
        self.methods: dict[str, tuple[str, Any, Callable[..., Any]]] = {}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, name, None), list):
                setattr(node, name, self._rewritten(statements))
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _called(node, _DROPOUT) and _called(activation := node.args[0], _ACTIVATION):
            return self._relu(node, activation)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Add):
            return node
        if (dropped := self._dropped(node.right)) is not None:
            return self._sum(node, node.left, *dropped)
        if _name(node.right) and (dropped := self._dropped(node.left)) is not None:
            return self._sum(node, node.right, *dropped, swapped=True)
        return node

    def _new_call(self, node: ast.AST, function: ast.expr | str, *arguments: ast.expr | bool) -> ast.Call:
        if isinstance(function, str):
            function = ast.Attribute(ast.Name("self", ast.Load()), function, ast.Load())
        given = [ast.Constant(x) if isinstance(x, bool) else x for x in arguments]
        return ast.fix_missing_locations(ast.copy_location(ast.Call(function, given, []), node))

    def _relu(self, node: ast.Call, activation: ast.Call) -> ast.Call:
        self.sites.append(Site("relu_dropout", _member(node.func), _member(activation.func)))
        return self._new_call(node, "_fused_dropout_relu", node.func, activation.func, activation.args[0])

    def _sum(
        self, node: ast.AST, residual: ast.expr, dropout: ast.expr, x: ast.expr, swapped: bool = False
    ) -> ast.Call:
        self.sites.append(Site("dropout_add", _member(dropout)))
        return self._new_call(node, "_fused_dropout_sum", residual, dropout, x, swapped)

    def _dropped(self, node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
        """The dropout and its input, for ``self.dropout(x)`` or a call of a method that returns it; else None."""
        if _called(node, _DROPOUT):
            return node.func, node.args[0]
        if not isinstance(node, ast.Call) or not (name := _member(node.func)):
            return None
        dropout = self.methods[name][0] if name in self.methods else self._add_method(name)
        if not dropout:
            return None
        itself = ast.Name("self", ast.Load())
        node.func = ast.Attribute(itself, _UNDROPPED + name, ast.Load())
        return ast.Attribute(itself, dropout, ast.Load()), ast.fix_missing_locations(node)

    def _add_method(self, name: str) -> str:
        """Adds the method without the dropout at its end. Returns the dropout's name, or an empty string if none."""
        if not inspect.isfunction(source := getattr(self.kind, name, None)):
            return ""
        try:
            tree, function = _read(self.kind, name)
            dropout, in_tuple = _remove_last_dropout(tree) or ("", False)
            if not dropout or in_tuple:
                return ""
            inner = _Rewriter(self.kind, tree)
            inner.visit(tree)
            self.methods |= {**inner.methods, name: (dropout, source, _compile(tree, function))}
        except UnusableSource:
            return ""
        self.sites += inner.sites
        return dropout

    def _rewritten(self, statements: list[Any]) -> list[Any]:
        """The statements, after rewriting each form that extends over two of them."""
        done: list[Any] = []
        for statement in statements:
            before: Any = done[-1] if done else None
            if self._is_relu_and_dropout(before, statement):
                statement.value = self._relu(statement.value, done.pop().value)
            elif (node := self._sum_of(before, statement)) is not None:
                x, swapped = _target(before), _name(node.left) == _target(before)
                residual, own = (node.right, node.left) if swapped else (node.left, node.right)
                new = None
                if _called(call := before.value, _DROPOUT) and not isinstance(before.targets[0], ast.Tuple):
                    new, before.value = self._sum(node, residual, call.func, own, swapped), call.args[0]
                elif isinstance(call, ast.Call) and self._is_module(name := _member(call.func)):
                    in_tuple = isinstance(before.targets[0], ast.Tuple)
                    self.sites.append(Site("dropout_add", layer=name, in_tuple=in_tuple))
                    layer = f"_fused_dropout_{x}"
                    found = self._new_call(call, "_fused_dropout_layer", call.func, in_tuple)
                    done.insert(-1, ast.copy_location(ast.Assign([ast.Name(layer, ast.Store())], found), before))
                    run, total = (
                        ast.Attribute(ast.Name(layer, ast.Load()), part, ast.Load()) for part in ("run", "sum")
                    )
                    call.func, new = run, self._new_call(node, total, residual, own, swapped)
                if new is not None and statement.value is node:
                    statement.value = new
                elif new is not None:
                    statement.value.args[0] = new
            done.append(statement)
        return done

    def _is_module(self, name: str) -> bool:
        """Whether ``self.name`` can be a module: it is not a method, and was not added by this file."""
        return bool(name) and not hasattr(self.kind, name) and not name.startswith("_fused_dropout")

    def _is_relu_and_dropout(self, before: Any, statement: Any) -> bool:
        """``x = self.activation(...)``, then ``x = self.dropout(x)``."""
        if not (x := _target(before)) or _target(statement) != x:
            return False
        if any(isinstance(each.targets[0], ast.Tuple) for each in (before, statement)):
            return False
        if not _called(before.value, _ACTIVATION) or not _called(statement.value, _DROPOUT):
            return False
        return _name(statement.value.args[0]) == x

    def _sum_of(self, before: Any, statement: Any) -> ast.BinOp | None:
        """The sum of two names in a statement, if the statement before assigns one of them, which is not read later.

        The statement has only the sum, or a call ``self.name(x + y)``.
        """
        x = _target(before)
        if not x or not isinstance(statement, ast.Assign | ast.Return):
            return None
        node: Any = statement.value
        if _called(node, ("",)):
            node = node.args[0]
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
            return None
        names = [_name(node.left), _name(node.right)]
        if not all(names) or names.count(x) != 1:
            return None
        plain = isinstance(statement, ast.Assign) and not isinstance(statement.targets[0], ast.Tuple)
        gone = isinstance(statement, ast.Return) or (plain and _target(statement) == x)
        return node if gone or _loads(self.tree, x) == _loads(before, x) + 1 else None


@functools.cache
def rewrite(kind: Any, source: Any) -> Rewritten | str:
    """Rewrites the forward of a class, which is ``source``. Returns the reason as text if that is not possible."""
    try:
        tree, function = _read(kind, "forward")
        rewriter = _Rewriter(kind, tree)
        rewriter.visit(tree)
        if not rewriter.sites:
            return NO_FORM
        for own in (kind.__init_subclass__, kind.__reduce__, kind.__reduce_ex__):
            python = inspect.isfunction(own) or inspect.ismethod(own)
            if python and _origin(own)[0] != _CHECKPOINTING[0]:
                return f"{kind.__name__} has its own {own.__name__}"
        forward = _compile(tree, function)
    except UnusableSource as reason:
        return str(reason)
    methods = {_UNDROPPED + name: method for name, (_, _, method) in rewriter.methods.items()}
    sources = {"forward": source} | {name: method for name, (_, method, _) in rewriter.methods.items()}
    return Rewritten(forward, methods, rewriter.sites, sources)
