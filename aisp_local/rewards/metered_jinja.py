"""A sandboxed Jinja whose templates cannot run away: every loop, call and new value costs work, and work is bounded.

Jinja's own sandbox keeps a template from Python's objects, but not from a loop of a loop, a recursion, or a text that
doubles itself. A clock would stop these too, but then it would depend on how busy the machine is what is refused.
Work is counted in characters: a value costs 16 and what is inside it; a step of a loop, or a call, 256 and the
template's own text, which it may write.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_STEP, _ITEM = 256, 16
# Filters and methods whose result may be longer than what they are given: by each argument's size or number.
_GROWS = {"batch", "center", "expandtabs", "indent", "join", "ljust", "rjust", "slice", "tojson", "wordwrap", "zfill"}
_UNBOUNDED = {"format_map", "to_bytes", "translate"}  # no template needs them
_RANDOM = ("lipsum", "random")  # a score must not depend on chance
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{5})|\{[^}]*:[^}]*(?:\{|\d{5})")
_BITS = 100_000  # of the largest number


class RanAwayError(Exception):
    """A template did more work than it may."""


class Meter:
    """The work that is left."""

    def __init__(self, work: int) -> None:
        self._left = work

    def spend(self, work: int, what: str) -> None:
        self._left -= work
        if self._left < 0:
            raise RanAwayError(what)

    def size(self, value: Any) -> int:
        """Characters and items of a value, all that is inside included; counting ends where the work does."""
        total, rest = 0, [value]
        while rest:
            one = rest.pop()
            total += _ITEM
            if isinstance(one, (str, bytes)):
                total += len(one)
            elif isinstance(one, int):
                total += one.bit_length() // 8
            elif isinstance(one, range):
                total += _ITEM * len(one)
            elif isinstance(one, Mapping):
                rest += [*one.keys(), *one.values()]
            elif isinstance(one, (list, tuple, set, frozenset)):
                rest += one
            if total + len(rest) > self._left:
                raise RanAwayError("a very long value")
        return total

    def made(self, value: Any) -> Any:
        """The value, paid for."""
        self.spend(self.size(value), "a very long value")
        return value

    def steps(self, values: Iterable[Any], cost: int) -> Any:
        """What a loop goes through, as a list, all its steps paid for."""
        found = []
        for value in values:
            self.spend(cost, "a very long loop")
            found.append(value)
        return found


class _Namespace(Namespace):
    def __repr__(self) -> str:  # those within one another would take for ever to write
        return "<Namespace>"


class _Instrumented(NodeTransformer):
    """Loops and new values pass through the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("_steps", node.iter)
        return node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node)

    visit_Concat = visit_List = visit_Dict = _made

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx == "load":
            return self._made(node)
        self.generic_visit(node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if isinstance(node.arg, nodes.Slice):
            return self._made(node)
        self.generic_visit(node)
        return node


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs templates within ``with environment.meter(Meter(...))``; threads have a meter of their own."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._written, **options)
        self._running = threading.local()
        self._step = _STEP
        for name in _RANDOM:
            self.filters.pop(name, None)
            self.globals.pop(name, None)
        self.globals["namespace"] = _Namespace
        self.filters = {name: self.metered(name, function) for name, function in self.filters.items()}
        self.filters |= {"_steps": self._steps, "_made": lambda value: self._meter.made(value)}

    @contextmanager
    def meter(self, meter: Meter) -> Iterator[None]:
        self._running.meter = meter
        try:
            yield
        finally:
            del self._running.meter

    @property
    def _meter(self) -> Meter:
        found: Meter = self._running.meter
        return found

    def template(self, tree: nodes.Template) -> Any:
        """The compiled template of a tree that ``parse`` gave. The environment is for this one alone."""
        self._step = _STEP + sum(len(data.data) for data in tree.find_all(nodes.TemplateData))
        code = self.compile(_Instrumented().visit(tree))
        return self.template_class.from_code(self, code, self.globals)

    def metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for what it gives. Keeps what Jinja has noted on the function."""
        passes = int(getattr(function, "jinja_pass_arg", None) is not None)  # the environment or context comes first

        @wraps(function)
        def filter_(*args: Any, **named: Any) -> Any:
            before, rest = args[:passes], args[passes:]
            rest = tuple(self._steps(arg) if isinstance(arg, Iterator) else arg for arg in rest)
            self._check(name, rest[0] if rest else "", [*rest[1:], *named.values()])
            result = function(*before, *rest, **named)
            return self._steps(result) if isinstance(result, Iterator) else self._meter.made(result)

        return filter_

    def call(self, context: Any, obj: Any, /, *args: Any, **named: Any) -> Any:
        self._meter.spend(self._step, "very many calls")
        if isinstance(obj, LoopContext):
            return super().call(context, obj, *(self._steps(arg) for arg in args), **named)
        if not isinstance(obj, Macro):
            inner = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
            self._check(getattr(inner, "__name__", ""), getattr(inner, "__self__", ""), [*args, *named.values()])
        result = super().call(context, obj, *args, **named)
        return self._steps(result) if isinstance(result, Iterator) else self._meter.made(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = self._meter
        if isinstance(left, str) and operator == "%":
            self._check("format", left, [right])
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS:
                raise RanAwayError("a very large number")
        elif operator == "*":
            repeated, times = (right, left) if isinstance(left, int) else (left, right)
            meter.spend(meter.size(repeated) * max(0, times if isinstance(times, int) else 0), "'*'")
        return meter.made(super().call_binop(context, operator, left, right))

    def _steps(self, values: Iterable[Any]) -> Any:
        return self._meter.steps(values, self._step)

    def _written(self, value: Any) -> Any:
        self._meter.spend(self._meter.size(value), "a very long text")
        return value

    def _check(self, name: str, value: Any, args: list[Any]) -> None:
        """Pay before it is done for what may become long."""
        meter = self._meter
        if name in _UNBOUNDED:
            raise RanAwayError(f"{name!r} may write any length")
        if name == "replace" and isinstance(value, str) and args:
            texts = [arg for arg in args if isinstance(arg, str)]
            if len(texts) > 1:
                meter.spend(len(value) + value.count(texts[0]) * len(texts[1]), "'replace'")
        elif name == "format" and isinstance(value, str):
            if _WIDE.search(value):
                raise RanAwayError("a very wide format")
            meter.spend((value.count("{") + value.count("%")) * meter.size(args), "'format'")
        elif name in _GROWS:
            widths = [abs(arg) if isinstance(arg, int) else len(arg) for arg in args if isinstance(arg, (int, str))]
            if name == "join" and isinstance(value, str):  # the method: the separator is what is repeated
                widths, value = [len(value)], args
            meter.spend(meter.size(value) * (1 + max([0, *widths])), f"{name!r}")
