"""Stub until the real one lands."""


class Tokenizer: ...


class TextStream: ...
