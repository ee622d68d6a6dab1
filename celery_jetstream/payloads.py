"""Typed payloads: what a handler says its event's payload is, and reading it so.

A pydantic model and a msgspec Struct read themselves. A dataclass and a TypedDict are read here, so
that they mean the same whatever is installed: strictly by JSON's types, text for what JSON has not
(times, ``Decimal``, ``UUID``), keys that are not known passed over. Pure.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from functools import lru_cache, partial
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)
from uuid import UUID

from .exceptions import ConfigurationError, PayloadError, kind_of, shown

__all__ = ("PayloadType", "payload_type")

Faults = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class PayloadType:
    """What a handler's ``payload=`` amounts to.

    Attributes:
        name: the class's.
        read: from plain JSON values to the typed payload; raises :class:`PayloadError`.
        schema: the JSON Schema; raises ``ConfigurationError`` where a field cannot be read.
    """

    name: str
    read: Callable[[Any], Any]
    schema: Callable[[], dict[str, Any]]


def payload_type(kind: Any) -> PayloadType:
    """What reads payloads of a class.

    Args:
        kind: a pydantic model, a dataclass, a TypedDict or a msgspec Struct.

    Raises:
        ConfigurationError: it is none of them.
    """
    name, is_class = getattr(kind, "__qualname__", repr(kind)), isinstance(kind, type)
    if is_class and hasattr(kind, "model_validate"):
        return PayloadType(name, partial(_by_pydantic, kind), kind.model_json_schema)
    if is_class and hasattr(kind, "__struct_fields__"):
        return PayloadType(name, partial(_by_msgspec, kind), partial(_msgspec_schema, kind))
    if is_class and (dataclasses.is_dataclass(kind) or is_typeddict(kind)):
        return PayloadType(name, partial(_by_hints, kind), partial(_schema, kind))
    raise ConfigurationError(
        f"payload={shown(kind)} is none of a pydantic model, a dataclass, a TypedDict and a "
        "msgspec Struct; give the class itself",
        setting="payload",
    )


# -- the libraries ---------------------------------------------------------------------------------


def _by_pydantic(kind: Any, value: Any) -> Any:
    from pydantic import ValidationError

    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise PayloadError([(_path(e["loc"]), e["msg"]) for e in error.errors()]) from None


def _by_msgspec(kind: Any, value: Any) -> Any:
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:  # which tells of the first fault only
        message, _, where = str(error).partition(" - at `$")
        raise PayloadError([(f"payload{where.rstrip('`')}", message)]) from None


def _msgspec_schema(kind: Any) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.json.schema(kind)
    return found


def _path(location: Sequence[Any]) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return "payload" + "".join(steps)


# -- dataclasses and TypedDicts --------------------------------------------------------------------


def _by_hints(kind: Any, value: Any) -> Any:
    faults: Faults = []
    found = _read(kind, value, "payload", faults)
    if faults:
        raise PayloadError(faults)
    return found


class _Misfit(Exception):
    """A value is not of the type; the message says what it must be."""


def _read(hint: Any, value: Any, path: str, faults: Faults) -> Any:
    """The value as the hint has it; what is wrong with it is added to ``faults``."""
    try:
        return _convert(hint, value, path, faults)
    except _Misfit as misfit:
        faults.append((path, f"must be {misfit}, and is {kind_of(value)}"))  # logged: no value
        return None


def _convert(hint: Any, value: Any, path: str, faults: Faults) -> Any:
    hint, origin = _plain(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _of_union(hint, value, path)
    if origin is Literal:
        return _of_literal(hint, value)
    if dataclasses.is_dataclass(hint) or is_typeddict(hint):
        return _of_fields(hint, value, path, faults)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _of_enum(hint, value)
    if hint in _SCALARS:
        return _SCALARS[hint].read(value)
    container = origin or hint
    if container in _SEQUENCES:
        return _of_sequence(hint, container, value, path, faults)
    if container in _MAPPINGS:
        return _of_mapping(hint, value, path, faults)
    raise _unreadable(hint)


def _of_union(hint: Any, value: Any, path: str) -> Any:
    for member in get_args(hint):
        faults: Faults = []
        found = _read(member, value, path, faults)
        if not faults:
            return found
    raise _Misfit(" or ".join(_name(member) for member in get_args(hint)))


def _of_literal(hint: Any, value: Any) -> Any:
    for member in get_args(hint):
        if type(member) is type(value) and member == value:
            return member
    raise _Misfit(f"one of {', '.join(map(repr, get_args(hint)))}")


def _of_enum(hint: type[enum.Enum], value: Any) -> Any:
    for member in hint:
        if type(member.value) is type(value) and member.value == value:
            return member
    raise _Misfit(f"one of {', '.join(repr(member.value) for member in hint)}")


def _of_fields(hint: Any, value: Any, path: str, faults: Faults) -> Any:
    if not isinstance(value, Mapping):
        raise _Misfit("an object")
    found: dict[str, Any] = {} if dataclasses.is_dataclass(hint) else dict(value)
    before = len(faults)
    for name, field_hint, required in _fields(hint):
        if name in value:
            found[name] = _read(field_hint, value[name], f"{path}.{name}", faults)
        elif required:
            faults.append((f"{path}.{name}", "is missing"))
    if not dataclasses.is_dataclass(hint) or len(faults) > before:
        return found
    try:
        make: Any = hint
        return make(**found)
    except Exception as error:  # of a __post_init__
        faults.append((path, f"is refused: {error}"))
        return None


def _of_sequence(hint: Any, container: Any, value: Any, path: str, faults: Faults) -> Any:
    if not isinstance(value, list):
        raise _Misfit("a list")
    arguments = get_args(hint) or (Any,)
    if container is tuple and arguments[-1:] != (...,) and get_args(hint):
        if len(value) != len(arguments):
            raise _Misfit(f"a list of {len(arguments)}")
    else:
        arguments = (arguments[0],) * len(value)
    items = [
        _read(argument, item, f"{path}[{index}]", faults)
        for index, (argument, item) in enumerate(zip(arguments, value, strict=True))
    ]
    try:
        return _SEQUENCES[container](items)
    except TypeError:  # of items that cannot be in a set
        raise _Misfit("a list of plain values") from None


def _of_mapping(hint: Any, value: Any, path: str, faults: Faults) -> Any:
    if not isinstance(value, Mapping):
        raise _Misfit("an object")
    _, values = get_args(hint) or (str, Any)
    return {key: _read(values, item, f"{path}.{key}", faults) for key, item in value.items()}


def _plain(hint: Any) -> tuple[Any, Any]:
    """Without ``Annotated``, ``NewType`` and the like; and its origin."""
    while True:
        origin = get_origin(hint)
        if origin is Annotated or getattr(origin, "_name", "") in ("Required", "NotRequired"):
            hint = get_args(hint)[0]
        elif hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
        else:
            return hint, origin


@lru_cache(maxsize=512)
def _fields(hint: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type, and whether it must be there."""
    hints = get_type_hints(hint)
    if is_typeddict(hint):
        return tuple((name, hints[name], name in hint.__required_keys__) for name in hints)
    missing = dataclasses.MISSING
    return tuple(
        (f.name, hints[f.name], f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(hint)
        if f.init
    )


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    return getattr(hint, "__name__", str(hint))


def _unreadable(hint: Any) -> ConfigurationError:
    return ConfigurationError(
        f"a payload cannot be read as {_name(hint)}: give the field a type of JSON's, a time, "
        "Decimal, UUID, an Enum, a dataclass or a TypedDict; or take a pydantic model",
        setting="payload",
    )


# -- scalars ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """How JSON's values become one of a type, and its JSON Schema."""

    what: str
    take: Callable[[Any], Any]
    schema: Mapping[str, Any]

    def read(self, value: Any) -> Any:
        try:
            return self.take(value)
        except (ValueError, TypeError, InvalidOperation):
            raise _Misfit(self.what) from None


def _exactly(kind: type) -> Callable[[Any], Any]:
    def take(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return take


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError
    return float(value)


def _decimal(value: Any) -> Decimal:
    if type(value) not in (int, float, str):
        raise ValueError
    return Decimal(str(value))


def _moment(kind: Any) -> Callable[[Any], Any]:
    def take(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError
        return kind.fromisoformat(re.sub("[zZ]$", "+00:00", value))  # Python 3.10 knows no Z

    return take


def _uuid(value: Any) -> UUID:
    if not isinstance(value, str):
        raise ValueError
    return UUID(value)


_SCALARS: dict[Any, _Scalar] = {
    bool: _Scalar("true or false", _exactly(bool), {"type": "boolean"}),
    int: _Scalar("a whole number", _exactly(int), {"type": "integer"}),
    float: _Scalar("a number", _float, {"type": "number"}),
    str: _Scalar("text", _exactly(str), {"type": "string"}),
    type(None): _Scalar("null", _exactly(type(None)), {"type": "null"}),
    None: _Scalar("null", _exactly(type(None)), {"type": "null"}),
    dict: _Scalar("an object", _exactly(dict), {"type": "object"}),
    Decimal: _Scalar("a number, or one as text", _decimal, {"type": ["string", "number"]}),
    UUID: _Scalar("a UUID as text", _uuid, {"type": "string", "format": "uuid"}),
    datetime: _Scalar(
        "a time in ISO 8601", _moment(datetime), {"type": "string", "format": "date-time"}
    ),
    date: _Scalar("a date in ISO 8601", _moment(date), {"type": "string", "format": "date"}),
    time: _Scalar("a time of day in ISO 8601", _moment(time), {"type": "string", "format": "time"}),
}
_SEQUENCES: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    Sequence: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    AbstractSet: frozenset,
}
_MAPPINGS = (dict, Mapping)


# -- JSON Schema -----------------------------------------------------------------------------------


def _schema(hint: Any, above: tuple[Any, ...] = ()) -> dict[str, Any]:
    hint, origin = _plain(hint)
    if hint is Any or hint in above:  # a type within itself is not spelled out twice
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(member, above) for member in get_args(hint)]}
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if dataclasses.is_dataclass(hint) or is_typeddict(hint):
        return _object_schema(hint, (*above, hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if hint in _SCALARS:
        return dict(_SCALARS[hint].schema)
    container, arguments = origin or hint, get_args(hint)
    if container in _SEQUENCES:
        if container is tuple and arguments and arguments[-1] is not ...:
            return {"type": "array", "prefixItems": [_schema(a, above) for a in arguments]}
        return {"type": "array", "items": _schema(arguments[0], above) if arguments else {}}
    if container in _MAPPINGS:
        return {
            "type": "object",
            "additionalProperties": _schema(arguments[1], above) if arguments else {},
        }
    raise _unreadable(hint)


def _object_schema(hint: Any, above: tuple[Any, ...]) -> dict[str, Any]:
    return {
        "title": hint.__name__,
        "type": "object",
        "properties": {name: _schema(kind, above) for name, kind, _ in _fields(hint)},
        "required": list(_required(hint)),
    }


def _required(hint: Any) -> Iterator[str]:
    return (name for name, _, required in _fields(hint) if required)
