"""The errors that a user can cause, each one sentence: what was got, the rule, the remedy, the path."""

from __future__ import annotations


class LeafsegError(Exception):
    """Base of all errors whose message is meant for the user; the command line prints it and exits with code 2."""


class DataError(LeafsegError):
    """An image, mask, folder, manifest or split that breaks a rule of the data layout."""


class ConfigError(LeafsegError):
    """A setting that is unknown, out of range, or contradicts another one."""


class CheckpointError(LeafsegError):
    """A model folder or training checkpoint that is missing, damaged, or of another shape."""


class MissingExtraError(LeafsegError):
    """An optional package that a feature needs is not installed; the message names the extra or the install command."""


def last_line(error: BaseException) -> str:
    """What a library's exception says, short and printable; ITK's span many lines, the last of which says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "".join(c if c.isprintable() else "?" for c in lines[-1]) if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
