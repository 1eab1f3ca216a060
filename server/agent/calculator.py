"""Arithmetic for the model: exact, and bounded in size, depth and time whatever is asked.

    sum      = product (("+" | "-") product)*
    product  = sign (("*" | "/" | "//" | "%" | "mod") sign)*      % only before another operand
    sign     = ("+" | "-")* power
    power    = percent (("**" | "^") sign)?
    percent  = atom "%"*                                          a hundredth
    atom     = number | "(" sum ")"

Numbers are fractions, so 0.1 + 0.2 is 0.3; only a root (a power with a fraction) is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Context, Decimal, DecimalException
from fractions import Fraction
from typing import NamedTuple

__all__ = ["CalculatorError", "calculate"]

MAX_CHARS = 512
MAX_DEPTH = 32
MAX_BITS = 4096
"""Most bits of a numerator or a denominator, in between and at the end."""
SHOWN_DIGITS = 15
"""Significant digits of a result that is not whole; whole numbers are shown whole."""

_TOKEN = re.compile(r"\s*(?:(\d[\d,_]*(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,4})(?!\w))?|(\*\*|//|.))")
_SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "p"})
_ROOTS = Context(prec=30)


class CalculatorError(ValueError):
    """The expression has no value; the message says why."""


class _Token(NamedTuple):
    value: Fraction | None
    """None for an operator or a bracket."""
    sign: str


def calculate(expression: str) -> int | float | str:
    """Return an expression's value as JSON shows it best.

    A whole number is an int up to 2**53 (JavaScript's limit) and digits in a string beyond; others
    are rounded to 15 digits. Raises CalculatorError.
    """
    if len(expression) > MAX_CHARS:
        raise CalculatorError(
            f"the expression has {len(expression)} characters; at most {MAX_CHARS} are allowed"
        )
    parser = _Parser(list(_tokens(expression)))
    return _shown(parser.result())


def _tokens(expression: str) -> Iterator[_Token]:
    text = expression.strip().translate(_SAME).replace("**", "p")
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=[\d(.-])", "*", text)
    text = re.sub(r"\bmod\b", "m", text.rstrip("= "))
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            return
        number, exponent, sign = found.groups()
        at = found.end()
        if number is None:
            if sign not in ("//", *"+-*/%mp()$"):
                raise CalculatorError(f"{sign!r} has no meaning in arithmetic")
            if sign != "$":
                yield _Token(None, sign)
            continue
        digits = number.replace(",", "").replace("_", "")
        if exponent is not None and abs(int(exponent)) > MAX_BITS // 4:
            raise CalculatorError("a number is too large")
        yield _Token(_bounded(Fraction(Decimal(f"{digits}e{exponent or 0}"))), number)


class _Parser:
    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def result(self) -> Fraction:
        if not self._tokens:
            raise CalculatorError("the expression is empty")
        value = self._sum()
        if self._at < len(self._tokens):
            raise CalculatorError(f"{self._shown_sign()} cannot stand there")
        return value

    def _shown_sign(self) -> str:
        sign = self._tokens[self._at].sign
        return repr({"p": "**", "m": "mod"}.get(sign, sign))

    def _takes(self, *signs: str) -> str | None:
        if self._at < len(self._tokens):
            token = self._tokens[self._at]
            if token.value is None and token.sign in signs:
                self._at += 1
                return token.sign
        return None

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._takes("+", "-"):
            other = self._product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._sign()
        while sign := self._takes("*", "/", "//", "%", "m"):
            other = self._sign()
            if sign == "*":
                value = _bounded(value * other)
                continue
            if other == 0:
                raise CalculatorError("division by zero")
            if sign == "/":
                value = _bounded(value / other)
            else:
                value = _bounded(Fraction(value // other) if sign == "//" else value % other)
        return value

    def _sign(self) -> Fraction:
        negative = False
        while sign := self._takes("+", "-"):
            negative ^= sign == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> Fraction:
        base = self._percent()
        if not self._takes("p"):
            return base
        self._enter()
        exponent = self._sign()
        self._depth -= 1
        return _power(base, exponent)

    def _percent(self) -> Fraction:
        value = self._atom()
        while not self._operand_follows_percent() and self._takes("%"):
            value /= 100
        return value

    def _operand_follows_percent(self) -> bool:
        """Whether the % here is a remainder: 7 % 3, but not 7% or 7% - 3."""
        if self._at + 1 >= len(self._tokens):
            return False
        after = self._tokens[self._at + 1]
        return after.value is not None or after.sign == "("

    def _atom(self) -> Fraction:
        if self._at >= len(self._tokens):
            raise CalculatorError("the expression ends where a number should be")
        value = self._tokens[self._at].value
        if value is not None:
            self._at += 1
            return value
        if not self._takes("("):
            raise CalculatorError(f"{self._shown_sign()} stands where a number should be")
        self._enter()
        value = self._sum()
        self._depth -= 1
        if not self._takes(")"):
            raise CalculatorError("a bracket is not closed")
        return value

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise CalculatorError(f"brackets and powers are nested more than {MAX_DEPTH} deep")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent < 0:
        raise CalculatorError("division by zero")
    if exponent.denominator != 1:
        return _root(base, exponent)
    # Checked before, not after: the power itself is what takes the time.
    if _bits(base) > 1 and abs(exponent) * (_bits(base) - 1) > MAX_BITS:
        raise CalculatorError("the result is too large")
    return _bounded(base ** int(exponent))


def _root(base: Fraction, exponent: Fraction) -> Fraction:
    if base < 0:
        raise CalculatorError("a root of a negative number is no real number")
    try:
        value = _ROOTS.power(_decimal(base), _decimal(exponent))
        if value and abs(value.adjusted()) > MAX_BITS // 4:
            raise CalculatorError("the result is too large")
        return _bounded(Fraction(value))
    except (DecimalException, OverflowError) as error:
        raise CalculatorError("the result is too large") from error


def _decimal(value: Fraction) -> Decimal:
    return _ROOTS.divide(Decimal(value.numerator), Decimal(value.denominator))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise CalculatorError("a number is too large")
    return value


def _shown(value: Fraction) -> int | float | str:
    if value.denominator == 1:
        whole = value.numerator
        return whole if abs(whole) <= 2**53 else str(whole)
    context = Context(prec=SHOWN_DIGITS)
    rounded = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    if rounded == rounded.to_integral_value() and abs(rounded) <= 2**53:
        return int(rounded)
    return float(rounded) if abs(rounded.adjusted()) < 300 else str(rounded)
