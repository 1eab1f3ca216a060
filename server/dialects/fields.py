"""Strict readers of JSON request bodies, shared by every dialect.

``Fields`` wraps one JSON object. Each reader takes one field, checks type and range, and raises an
ApiError whose ``param`` is the exact path and whose message gives the value and what would be
right. As in OpenAI's API, null stands for "not given" everywhere.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from typing import Any

import orjson

from server.errors import ApiError, invalid, not_found

__all__ = ["Fields", "check_token_ids", "load_json", "read_model", "show", "unknown_model"]


_MAX_SHOWN = 80

_KIND_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def show(value: object) -> str:
    """Render a JSON value for an error message, cut to a readable length."""
    try:
        text = orjson.dumps(value).decode()
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _kind(value: object) -> str:
    return _KIND_NAMES.get(type(value), type(value).__name__)


def _wrong_type(path: str, wanted: str, value: object) -> ApiError:
    what = f"{_kind(value)}" if isinstance(value, str | list | dict | None) else show(value)
    return invalid(
        f"Invalid type for '{path}': expected {wanted}, but got {what}.",
        param=path,
        code="invalid_type",
    )


def load_json(data: bytes) -> object:
    """Parse a request body as JSON (RFC 8259: UTF-8, no NaN, no trailing text).

    Raises ApiError 400 saying where the text stops being JSON.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        reason = str(error) if data else "the body is empty"
    raise invalid(f"The request body is not valid JSON: {reason}.", code="invalid_json")


def _integer(path: str, value: object, least: int | None, most: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong_type(path, "an integer", value)
    _in_range(path, value, least, most)
    return value


def _in_range(path: str, value: float, least: float | None, most: float | None) -> None:
    if (least is None or value >= least) and (most is None or value <= most):
        return
    if least is None:
        wanted = f"at most {most}"
    elif most is None:
        wanted = f"at least {least}"
    else:
        wanted = f"between {least} and {most}"
    raise invalid(
        f"Invalid value for '{path}': {show(value)}; it must be {wanted}.",
        param=path,
        code="invalid_value",
    )


class Fields:
    """One JSON object of a request.

    ``path`` is where it lies in the body ("" at the top): errors name ``path`` + field. Raises
    ApiError 400 when ``body`` is no object.
    """

    def __init__(self, body: object, path: str = "") -> None:
        if not isinstance(body, dict):
            if path:
                raise _wrong_type(path, "an object", body)
            raise invalid(f"The request body must be a JSON object, but it is {_kind(body)}.")
        self._body: dict[str, Any] = body
        self._path = path

    def at(self, name: str) -> str:
        """Return the full path of a field."""
        return f"{self._path}.{name}" if self._path else name

    def raw(self, name: str) -> Any:
        """Return a field unchecked, None if it is not given."""
        return self._body.get(name)

    def given(self, name: str) -> bool:
        """Return whether a field is there and not null."""
        return self._body.get(name) is not None

    def required(self, name: str) -> Any:
        """Return a field that must be given, unchecked."""
        value = self._body.get(name)
        if value is None:
            path = self.at(name)
            raise invalid(
                f"Missing required parameter: '{path}'.",
                param=path,
                code="missing_required_parameter",
            )
        return value

    def integer(
        self, name: str, *, least: int | None = None, most: int | None = None
    ) -> int | None:
        """Read an integer; a boolean or a number with a fraction part is refused."""
        value = self._body.get(name)
        return None if value is None else _integer(self.at(name), value, least, most)

    def number(
        self, name: str, *, least: float | None = None, most: float | None = None
    ) -> float | None:
        """Read a finite number; a boolean is refused."""
        value = self._body.get(name)
        if value is None:
            return None
        path = self.at(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _wrong_type(path, "a number", value)
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid(
                f"Invalid value for '{path}': {value}; it must be a finite number.",
                param=path,
                code="invalid_value",
            )
        _in_range(path, value, least, most)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Read true or false."""
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong_type(self.at(name), "a boolean", value)
        return value

    def string(self, name: str, *, empty: bool = True, max_len: int | None = None) -> str | None:
        """Read a string; ``empty`` says whether it may be, ``max_len`` is in characters."""
        value = self._body.get(name)
        if value is None:
            return None
        path = self.at(name)
        if not isinstance(value, str):
            raise _wrong_type(path, "a string", value)
        if not value and not empty:
            raise invalid(f"'{path}' must not be empty.", param=path, code="empty_string")
        if max_len is not None and len(value) > max_len:
            raise invalid(
                f"'{path}' has {len(value)} characters; at most {max_len} are allowed.",
                param=path,
                code="string_above_max_length",
            )
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """Read one of a few words."""
        value = self.string(name)
        if value is None:
            return default
        if value not in allowed:
            path = self.at(name)
            words = ", ".join(f"'{word}'" for word in allowed)
            raise invalid(
                f"Invalid value for '{path}': {show(value)}; supported values are: {words}.",
                param=path,
                code="invalid_value",
            )
        return value

    def array(self, name: str, *, min_len: int = 0, max_len: int | None = None) -> list[Any] | None:
        """Read an array, its elements unchecked."""
        value = self._body.get(name)
        if value is None:
            return None
        path = self.at(name)
        if not isinstance(value, list):
            raise _wrong_type(path, "an array", value)
        if len(value) < min_len:
            raise invalid(
                f"'{path}' has {len(value)} elements; at least {min_len} must be given.",
                param=path,
                code="empty_array" if not value else "array_below_min_length",
            )
        if max_len is not None and len(value) > max_len:
            raise invalid(
                f"'{path}' has {len(value)} elements; at most {max_len} are allowed.",
                param=path,
                code="array_above_max_length",
            )
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Read an object, its values unchecked."""
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise _wrong_type(self.at(name), "an object", value)
        return value

    def inner(self, name: str) -> Fields | None:
        """Read an object whose fields are read in turn."""
        value = self._body.get(name)
        return None if value is None else Fields(value, self.at(name))

    def token_ids(
        self, name: str, *, vocab_size: int, max_len: int | None = None
    ) -> list[int] | None:
        """Read an array of token ids of the model's vocabulary."""
        values = self.array(name, max_len=max_len)
        if values is None:
            return None
        return check_token_ids(values, self.at(name), vocab_size)

    def unsupported(self, name: str, why: str, *neutral: object) -> None:
        """Refuse a feature that is not there, unless its value is null or one of ``neutral``."""
        value = self._body.get(name)
        if value is None or any(value == word and type(value) is type(word) for word in neutral):
            return
        path = self.at(name)
        raise invalid(
            f"'{path}' = {show(value)} is not supported: {why}.",
            param=path,
            code="unsupported_parameter",
        )

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Refuse fields not in ``known``: a misspelt setting must not be ignored silently."""
        for name in self._body:
            if name in known:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            path = self.at(name)
            raise invalid(
                f"Unknown parameter: '{path}'.{hint}", param=path, code="unknown_parameter"
            )


def check_token_ids(values: list[Any], path: str, vocab_size: int) -> list[int]:
    """Return ``values`` if all are ids of a vocabulary of ``vocab_size`` tokens."""
    # Whole passes in C first: a prompt of a hundred thousand ids must not hold the event loop.
    if set(map(type, values)) <= {int} and (
        not values or (min(values) >= 0 and max(values) < vocab_size)
    ):
        return values
    for index, value in enumerate(values):
        at = f"{path}[{index}]"
        if type(value) is not int:
            raise _wrong_type(at, "a token id", value)
        if not 0 <= value < vocab_size:
            raise invalid(
                f"Invalid value for '{at}': token id {value} is not in the model's vocabulary "
                f"(0 to {vocab_size - 1}).",
                param=at,
                code="invalid_token_id",
            )
    return values


def read_model(fields: Fields, served_name: str) -> str:
    """Return the model that a request names.

    Raises ApiError: 400 when it names none, 404 when it is not the one that is served.
    """
    name = fields.required("model")
    if not isinstance(name, str):
        raise _wrong_type(fields.at("model"), "a string", name)
    if name != served_name:
        raise unknown_model(name, served_name)
    return name


def unknown_model(name: str, served_name: str) -> ApiError:
    """Return the 404 for a model that is not served."""
    return not_found(
        f"The model {show(name)} does not exist here; this server serves '{served_name}'.",
        param="model",
        code="model_not_found",
    )
