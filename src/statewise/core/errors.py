"""Every mistake a user can make gives one line: what, where, expected, got, what to do. `code` is the exit status."""

from __future__ import annotations


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
