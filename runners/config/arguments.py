"""Arguments of ``kvbench run``, as Hydra's parser needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from ...conf.errors import InputError

TEXT_KEYS = ("task.prompt",)
"""Keys of texts with braces and commas, which Hydra's grammar would take for mappings and for choices of a sweep."""


def quote_texts(arguments: Sequence[str]) -> list[str]:
    r"""The arguments of a command with the values of :data:`TEXT_KEYS` in quotes, where they have none yet.

    ``\n`` in such a value is a newline, which is hard to type in a shell.
    """
    out = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in TEXT_KEYS:
            value = value.replace("\\n", "\n")
            is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            argument = f"{key}={value if is_quoted else QuotedString(value, Quote.double).with_quotes()}"
        out.append(argument)
    return out


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options of a command and its overrides, which Hydra's parser takes only together.

    Raises:
        InputError: Hydra has no such option.
        HydraException: The value of an option cannot be used.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise HydraException(message.removeprefix("argument "))

    parser.error = refuse  # type: ignore[method-assign]
    known, others = parser.parse_known_args(list(arguments))
    for option in others:
        if option.startswith("-"):
            name = option.lstrip("-").partition("=")[0]
            problem = "is no option: values are set by KEY=VALUE without dashes, and kvbench run --help lists the keys"
            raise InputError(f"--{name}" if option.startswith("--") else option, option.partition("=")[2], problem)
    overrides = [*known.overrides, *others]
    options = list(arguments)
    for override in reversed(overrides):  # of equal words, a value of an option comes first: -p task task=text
        del options[len(options) - 1 - options[::-1].index(override)]
    return options, overrides
