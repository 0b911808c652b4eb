"""A JSON schema as a grammar in llama.cpp's notation: every text of it is JSON that the schema takes.

The other way round it need not hold: properties come in the schema's order, and none is written that is not named there
unless none is named. What a grammar cannot hold a response to is refused, never passed over.

Own code, since the converter that llama-cpp-python ships passes over what it does not know, lets line breaks into
strings, and leaves backslashes of constants as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from aisp_local.errors import AispError, InputError

_NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator")
    + ("$schema", "$id", "$comment", "$defs", "definitions")
)
_OF = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength", "format")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
_KNOWN = frozenset(("type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf")).union(*_OF.values())
_REFUSED = frozenset(
    ("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "patternProperties")
    + ("propertyNames", "minProperties", "maxProperties", "uniqueItems", "contains", "minContains", "maxContains")
    + ("multipleOf", "pattern", "unevaluatedProperties", "unevaluatedItems", "additionalItems")
    + ("$dynamicRef", "$recursiveRef")
)
_MOST_PARTS = 100  # of oneOf, all pairs of which are compared
_DIGITS = 16  # of a number: what a double tells apart
_LARGEST = 10**_DIGITS - 1
_MONTHS = (
    '("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
    ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30")'
    ' | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
)
_BASE = {
    "space": '" "?',  # a small model would fill an answer with more
    # No control characters, and no half of a surrogate pair, which would count as one character and be none.
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] hex hex hex | [dD] [0-7] hex hex))',
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "integer": f'"-"? ("0" | [1-9] [0-9]{{0,{_DIGITS - 1}}})',
    "number": f'integer ("." [0-9]{{1,{_DIGITS}}})? ([eE] [-+]? [0-9]{{1,2}})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" space (member ("," space member)*)? space "}"',
    "member": 'string space ":" space value',
    "array": '"[" space (value ("," space value)*)? space "]"',
    "date": f'[12] [0-9] [0-9] [0-9] "-" ({_MONTHS})',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
    '("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])',
}
_NEEDS = {  # which other rules a rule of these needs
    "string": ("char",),
    "char": ("hex",),
    "number": ("integer",),
    "value": ("object", "array", "string", "number", "boolean", "null"),
    "object": ("member", "space"),
    "member": ("string", "value", "space"),
    "array": ("value", "space"),
}
_FORMATS = {
    "date": ("date", r'"\"" date "\""'),
    "time": ("time", r'"\"" time "\""'),
    "date-time": ("date time", r'"\"" date "T" time "\""'),
    "uuid": ("hex", r'"\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\""'),
}


def from_schema(schema: Mapping[str, Any]) -> str:
    """GBNF. Raises InputError, with where in the schema, for what is no schema and for what no grammar can hold to."""
    _check_valid(schema)
    return _Converter(schema).convert()


def _check_valid(schema: Mapping[str, Any]) -> None:
    try:
        import jsonschema_rs
    except ImportError as error:
        raise AispError(f"jsonschema-rs does not load ({error}); install it with: pip install jsonschema-rs") from error

    def refuse(uri: str) -> NoReturn:
        raise ValueError(f"{uri} lies outside the schema, and nothing is fetched")

    try:
        jsonschema_rs.validator_for(dict(schema), pattern_options=jsonschema_rs.RegexOptions(), retriever=refuse)
    except Exception as error:  # of jsonschema-rs, and what it says of Python values that no JSON has
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"that is not a valid JSON schema: {reason}") from error


def _literal(value: Any) -> str:
    """A JSON value as a quoted text of a grammar."""
    text = json.dumps(value, allow_nan=False).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


class _Converter:
    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._referred: dict[str, str] = {}  # rules by what a $ref names

    def convert(self) -> str:
        try:
            root = self._visit(self._schema, "#")
        except RecursionError as error:
            raise InputError("the schema is nested too deeply") from error
        return "".join(f"{name} ::= {rule}\n" for name, rule in [("root", root), *self._rules.items()])

    def _base(self, *names: str) -> str:
        """The first of these ready-made rules, which are now there with all that they need."""
        for name in names:
            if name not in self._rules:
                self._rules[name] = _BASE[name]
                self._base(*_NEEDS.get(name, ()))
        return names[0] if names else ""

    def _new(self, rule: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules[name] = rule
        return name

    def _refuse(self, at: str, what: str) -> InputError:
        return InputError(f"the schema at {at}: {what}")

    def _visit(self, schema: Any, at: str) -> str:
        """What can stand for the schema's values in a rule: a name, or an expression in parentheses."""
        if schema is True:
            return self._base("value")
        if schema is False:
            raise self._refuse(at, "false takes nothing, so that nothing could be written")
        for name in schema:
            if name in _REFUSED and schema[name] is not False:
                raise self._refuse(at, f"a grammar cannot hold a response to {name!r}; leave it out")
            if name in _OF["number"] and isinstance(schema[name], bool):
                raise self._refuse(at, f"{name!r} is true or false, as in old drafts; write the bound itself")
        used = {name for name in schema if name in _KNOWN}
        for name in ("$ref", "anyOf", "oneOf", "allOf"):
            if name in used:
                others = used - {name} - ({"type"} if name in ("anyOf", "oneOf") and "type" in schema else set())
                if others:
                    raise self._refuse(at, f"{name!r} beside {sorted(others)[0]!r} is more than a grammar can hold to")
                return self._combined(name, schema, at)
        if "const" in schema or "enum" in schema:
            return self._choice(schema, at)
        kinds = schema.get("type")
        if kinds is None:
            kinds = next((kind for kind in ("object", "array", "string", "number") if used & _OF[kind]), None)
            if kinds is None:
                return self._base("value")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        parts = [getattr(self, f"_{kind}")(schema, at) for kind in kinds]
        return str(parts[0]) if len(parts) == 1 else f"({' | '.join(parts)})"

    def _combined(self, name: str, schema: Mapping[str, Any], at: str) -> str:
        if name == "$ref":
            return self._reference(schema["$ref"], at)
        parts = schema[name]
        if "type" in schema and any(not _narrower(part, schema["type"]) for part in parts):
            raise self._refuse(at, f"{name!r} beside 'type', and not all of its parts are of that type")
        if name == "allOf" and len(parts) > 1:
            raise self._refuse(at, "a grammar cannot hold a response to 'allOf' with several parts; write one schema")
        if name == "oneOf":
            if len(parts) > _MOST_PARTS:
                raise self._refuse(at, f"'oneOf' has {len(parts)} parts; at most {_MOST_PARTS} are compared")
            parts = [self._resolved(part) for part in parts]
            for i, one in enumerate(parts):
                if any(not _apart(one, other) for other in parts[:i]):
                    raise self._refuse(at, "parts of 'oneOf' may overlap, which no grammar can rule out; use 'anyOf'")
        visited = [self._visit(part, f"{at}/{name}/{i}") for i, part in enumerate(schema[name])]
        return visited[0] if len(visited) == 1 else f"({' | '.join(visited)})"

    def _resolved(self, schema: Any) -> Any:
        for _ in range(10):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"], "#")
        return schema

    def _target(self, reference: str, at: str) -> Any:
        if not reference.startswith("#"):
            raise self._refuse(at, f"{reference!r} lies outside the schema, and nothing is fetched")
        found: Any = self._schema
        for part in reference[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            inside = found.get(key) if isinstance(found, Mapping) else None
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                inside = found[int(key)]
            if inside is None:
                raise self._refuse(at, f"{reference!r} is not there")
            found = inside
        if reference != "#" and not reference.startswith("#/"):
            raise self._refuse(at, f"{reference!r} is not understood; references are of the form #/$defs/NAME")
        if not isinstance(found, Mapping | bool):
            raise self._refuse(at, f"{reference!r} is no schema")
        return found

    def _reference(self, reference: str, at: str) -> str:
        if reference not in self._referred:
            target = self._target(reference, at)
            name = self._referred[reference] = self._new("")
            self._rules[name] = self._visit(target, reference)
        return self._referred[reference]

    def _choice(self, schema: Mapping[str, Any], at: str) -> str:
        values = [schema["const"]] if "const" in schema else list(schema["enum"])
        if "const" in schema and "enum" in schema and not _keys(values) & _keys(schema["enum"]):
            values = []
        kinds = schema.get("type")
        if kinds is not None:
            kinds = [kinds] if isinstance(kinds, str) else kinds
            values = [value for value in values if _kind(value) in kinds or ("number" in kinds and _number(value))]
        others = {name for name in schema if name in _KNOWN} - {"const", "enum", "type"}
        if others:
            raise self._refuse(at, f"{sorted(others)[0]!r} beside a choice of values; leave it out")
        if not values:
            raise self._refuse(at, "no value is left to choose from")
        try:
            return f"({' | '.join(_literal(value) for value in values)})"
        except ValueError as error:
            raise self._refuse(at, f"a value is no JSON ({error})") from error

    # By type.

    def _object(self, schema: Mapping[str, Any], at: str) -> str:
        self._base("space")
        properties = dict(schema.get("properties", {}))
        more = schema.get("additionalProperties", True)
        required = schema.get("required", [])
        for name in required:
            if name not in properties:
                if more is False:
                    raise self._refuse(at, f"{name!r} is required and not allowed")
                properties[name] = more
        if not properties:
            if more is False:
                return '("{" space "}")'
            if more is True:
                return self._base("object")
            value = self._visit(more, f"{at}/additionalProperties")
            member = self._new(f'{self._base("string")} space ":" space {value}')
            return self._new(f'"{{" space ({member} ("," space {member})*)? space "}}"')
        names = list(properties)
        members = [
            self._new(f'{_literal(name)} space ":" space {self._visit(value, f"{at}/properties/{name}")}')
            for name, value in properties.items()
        ]
        # What may follow the i-th, each part a rule of its own: else many optional ones would be as many squared.
        after = [""] * (len(names) + 1)
        for i in range(len(names) - 1, 0, -1):
            one = f'("," space {members[i]})' + ("" if names[i] in required else "?")
            after[i] = self._new(f"{one} {after[i + 1]}".rstrip())
        first = next((i for i, name in enumerate(names) if name in required), len(names) - 1)
        starts = [f"{members[i]} {after[i + 1]}".rstrip() for i in range(first + 1)]
        if not set(names) & set(required):
            starts.append("")
        return self._new(f'"{{" space ({" | ".join(starts)}) space "}}"')

    def _array(self, schema: Mapping[str, Any], at: str) -> str:
        self._base("space")
        first, items = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(items, list):
            raise self._refuse(at, "'items' is a list; write it as 'prefixItems'")
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        if first:
            if not least <= len(first) <= (len(first) if most is None else most):
                raise self._refuse(at, "'prefixItems' of another length than 'minItems' and 'maxItems' allow")
            parts = [self._visit(part, f"{at}/prefixItems/{i}") for i, part in enumerate(first)]
            return self._new('"[" space ' + ' "," space '.join(parts) + ' space "]"')
        if most is not None and most < least:
            raise self._refuse(at, "'maxItems' is below 'minItems'")
        if most == 0 or items is False:
            if least:
                raise self._refuse(at, "items are required and none are allowed")
            return '("[" space "]")'
        item = self._visit(items, f"{at}/items")
        rest = f'("," space {item})' + _times(max(0, least - 1), None if most is None else int(most) - 1)
        return self._new(f'"[" space ({item} {rest}){"" if least else "?"} space "]"')

    def _string(self, schema: Mapping[str, Any], at: str) -> str:
        least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
        if "format" in schema:
            if schema["format"] not in _FORMATS or least or most is not None:
                raise self._refuse(at, f"the format {schema['format']!r} is not known; use {', '.join(_FORMATS)}")
            needs, rule = _FORMATS[schema["format"]]
            self._base(*needs.split())
            return f"({rule})"
        if not least and most is None:
            return self._base("string")
        if most is not None and most < least:
            raise self._refuse(at, "'maxLength' is below 'minLength'")
        if most == 0:
            return r'("\"\"")'
        return rf'("\"" {self._base("char")}{_times(least, None if most is None else int(most))} "\"")'

    def _boolean(self, schema: Mapping[str, Any], at: str) -> str:
        return self._base("boolean")

    def _null(self, schema: Mapping[str, Any], at: str) -> str:
        return self._base("null")

    def _integer(self, schema: Mapping[str, Any], at: str) -> str:
        if not set(schema) & _OF["integer"]:
            return self._base("integer")
        low, high = -_LARGEST, _LARGEST
        if "minimum" in schema:
            low = max(low, math.ceil(schema["minimum"]))
        if "exclusiveMinimum" in schema:
            low = max(low, math.floor(schema["exclusiveMinimum"]) + 1)
        if "maximum" in schema:
            high = min(high, math.floor(schema["maximum"]))
        if "exclusiveMaximum" in schema:
            high = min(high, math.ceil(schema["exclusiveMaximum"]) - 1)
        if low > high:
            raise self._refuse(at, f"no whole number of up to {_DIGITS} digits is within the bounds")
        parts = []
        if low < 0:
            parts.append(f'"-" ({_whole(max(1, -high), -low)})')
        if high >= 0:
            parts.append(_whole(max(0, low), high))
        return f"({' | '.join(parts)})"

    def _number(self, schema: Mapping[str, Any], at: str) -> str:
        bounds = {name: schema[name] for name in sorted(_OF["number"]) if name in schema}
        if not bounds:
            return self._base("number")
        for name, value in bounds.items():
            if value != int(value) or abs(value) >= _LARGEST:
                raise self._refuse(at, f"{name!r} is {value}; of numbers only whole bounds can be held to")
        low, low_open = _bound(bounds.get("minimum"), bounds.get("exclusiveMinimum"), max)
        high, high_open = _bound(bounds.get("maximum"), bounds.get("exclusiveMaximum"), min)
        parts = []
        if low is None or low < 0:
            below = high is not None and high <= 0
            near, near_open = (-high, high_open) if below and high is not None else (0, False)
            found = _decimal(near, near_open, None if low is None else -low, low_open)
            parts += [f'"-" ({found})'] if found else []
        if high is None or high >= 0:
            near, near_open = (low, low_open) if low is not None and low >= 0 else (0, False)
            found = _decimal(near, near_open, high, high_open)
            parts += [found] if found else []
        if not parts:
            raise self._refuse(at, "no number is within the bounds")
        return f"({' | '.join(parts)})"


def _times(least: int, most: int | None) -> str:
    if most is None:
        return "*" if least == 0 else f"{{{least},}}"
    return f"{{{least},{most}}}"


def _whole(low: int, high: int) -> str:
    """Whole numbers from low, at least 0, to high, without leading zeros."""
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        parts.append(" | ".join(_between(str(first), str(last))))
    return " | ".join(parts)


def _between(low: str, high: str) -> Iterator[str]:
    """Alternatives for strings of digits of one length from low to high."""
    rest = len(low) - 1
    if not rest:
        yield f"[{low}-{high}]"
    elif low[0] == high[0]:
        yield f'"{low[0]}" ({" | ".join(_between(low[1:], high[1:]))})'
    else:
        first, last = int(low[0]), int(high[0])
        if int(low[1:]):
            yield f'"{first}" ({" | ".join(_between(low[1:], "9" * rest))})'
            first += 1
        ends = high[1:] != "9" * rest
        if first <= last - ends:
            yield f"[{first}-{last - ends}] [0-9]{{{rest}}}"
        if ends:
            yield f'"{last}" ({" | ".join(_between("0" * rest, high[1:]))})'


def _bound(closed: float | None, opened: float | None, tighter: Any) -> tuple[int | None, bool]:
    """The tighter of two bounds, and whether it is itself left out."""
    if opened is not None and (closed is None or tighter(closed, opened) == opened):
        return int(opened), True
    return (None, False) if closed is None else (int(closed), False)


def _decimal(low: int, low_open: bool, high: int | None, high_open: bool) -> str:
    """Numbers from low, at least 0, to high; empty if there are none."""
    parts, fraction = [], f'"." [0-9]{{1,{_DIGITS - 1}}}'
    first = low + 1 if low_open else low
    last = _LARGEST if high is None else high - 1
    if low_open and low <= last:
        parts.append(f'"{low}" "." [0-9]{{0,{_DIGITS - 2}}} [1-9]')
    if first <= last:
        parts.append(f"({_whole(first, last)}) ({fraction})?")
    if high is not None and not high_open and (low < high or (low == high and not low_open)):
        parts.append(f'"{high}"')
    return " | ".join(parts)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if _number(value):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, Sequence) else "object"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keys(values: Iterable[Any]) -> set[Hashable]:
    """Of JSON values, the same for those that are equal: true is not 1."""
    return {_key(value) for value in values}


def _key(value: Any) -> Hashable:
    kind = _kind(value)
    if kind == "array":
        return kind, tuple(_key(item) for item in value)
    if kind == "object":
        return kind, frozenset((name, _key(item)) for name, item in value.items())
    return kind, value


def _types(schema: Any) -> set[str]:
    """Types that a schema may take."""
    if isinstance(schema, Mapping):
        if "const" in schema:
            return {_kind(schema["const"])}
        if "enum" in schema:
            return {_kind(value) for value in schema["enum"]}
        if "type" in schema:
            kinds = {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
            return kinds | {"integer"} if "number" in kinds else kinds
    return set(_OF)


def _narrower(schema: Any, kinds: str | list[str]) -> bool:
    return _types(schema) <= _types({"type": kinds})


def _apart(one: Any, other: Any) -> bool:
    """Whether for sure nothing is both: other types, or a required property (or value) of which no choice is common."""
    if not _types(one) & _types(other):
        return True
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if _chosen_apart(one, other):
            return True
        both = set(one.get("required", [])) & set(other.get("required", []))
        mine, theirs = one.get("properties", {}), other.get("properties", {})
        if _types(one) == _types(other) == {"object"}:
            return any(_chosen_apart(mine.get(name), theirs.get(name)) for name in both)
    return False


def _chosen_apart(one: Any, other: Any) -> bool:
    choices = []
    for schema in (one, other):
        if not isinstance(schema, Mapping) or not {"const", "enum"} & set(schema):
            return False
        choices.append(_keys([schema["const"]] if "const" in schema else schema["enum"]))
    return not choices[0] & choices[1]
