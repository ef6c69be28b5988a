"""Every mistake a user can make gives one line: what, where, expected, got, what to do. `code` is the exit status."""

from __future__ import annotations

# the words of torch and of the system where no exception class of their own says it
NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory", "not enough memory")


class StatewiseError(Exception):
    """Base of the errors that the command line prints as one line."""

    code = 2


class UsageError(StatewiseError, ValueError):
    """A wrong argument, shape, dtype, flag or configuration value."""


class DataError(StatewiseError, ValueError):
    """A file, data set, state or checkpoint that cannot be used."""

    code = 3


class ResourceError(StatewiseError, OSError):
    """Disk or memory ran out."""

    code = 4


class NumericError(StatewiseError, ArithmeticError):
    """A loss, gradient or state that is not finite."""

    code = 5


class Unknown(UsageError, KeyError):
    """A name that no registry holds."""

    __str__ = Exception.__str__  # KeyError would print the repr


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of Python, of torch on a CPU or a GPU, or of the system."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)
