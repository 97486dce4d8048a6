"""Errors that the user can fix. Each names its subject, what was found, and how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence

#: Exit code of a command that ends with one of these errors.
EXIT_CODE = 2


class RetroError(Exception):
    """Base class of all errors caused by the user's input.

    Args:
        subject: The file, flag, field or argument at fault, as the user would write it.
        found: What was found.
        hint: What was expected, or how to fix it.

    Attributes:
        raised_together: Whether every rank raises the error, so one rank may report it for all.
    """

    raised_together = False

    def __init__(self, subject: object, found: str = "", hint: str = "") -> None:
        # Megatron re-raises an error in a module's forward as `type(error)(message)`. Then
        # `subject` is the whole message.
        self.subject, self.found, self.hint = str(subject), found, hint
        super().__init__(f"{self.subject}: {found}. {hint}" if found or hint else self.subject)

    @property
    def problems(self) -> tuple[RetroError, ...]:
        """The single problems, in the order found."""
        return (self,)

    def __reduce__(self) -> tuple:
        # Exceptions are pickled to travel between ranks; by default only the message would be.
        return type(self), (self.subject, self.found, self.hint)


class ConfigurationError(RetroError):
    """A flag or configuration field has an invalid value."""


class CorpusError(RetroError):
    """The input text is missing, empty or malformed."""


class TokenizerError(RetroError):
    """A tokenizer cannot be loaded, or does not match the project."""


class ProjectError(RetroError):
    """A project directory lacks a stage, or has another configuration."""


class CorruptFileError(ProjectError):
    """A project file is truncated, altered or in another format."""


class CheckpointError(RetroError):
    """A checkpoint cannot be read, or does not fit the model."""


class ShapeError(RetroError):
    """A tensor's shape does not match the model's configuration."""


class MissingDependencyError(RetroError):
    """A required optional package is not installed."""


class SystemRefusal(RetroError):
    """The operating system refused to read or write a file."""


class SeveralErrors(ConfigurationError):
    """Several problems of one configuration, reported together."""

    def __init__(self, problems: Sequence[RetroError] | str) -> None:
        problems = [RetroError(problems)] if isinstance(problems, str) else problems
        super().__init__("\n".join(str(problem) for problem in problems))
        self._problems = tuple(problems)

    @property
    def problems(self) -> tuple[RetroError, ...]:
        return self._problems

    def __reduce__(self) -> tuple:
        return type(self), (list(self._problems),)


def raise_problems(problems: Sequence[RetroError]) -> None:
    """Raise the problems: nothing if there are none, a single one itself, several as one error.

    Raises:
        RetroError: the only problem.
        SeveralErrors: more than one.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise SeveralErrors(problems)


def flag_of(option: str) -> str:
    """The flag of an option as the user writes it: `--seq-length` for `seq_length`."""
    return f"--{option.replace('_', '-')}"


def too_small(options: object, least: Mapping[str, int]) -> Iterator[ConfigurationError]:
    """Yield an error for each number below its least value; None is not a number.

    Args:
        options: An object with the options as attributes.
        least: The least value of each option to check.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            yield ConfigurationError(flag_of(name), str(value), f"Choose at least {bound}")


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks, even if some fail, and raise their errors together.

    Raises:
        RetroError: the only problem.
        SeveralErrors: more than one.
    """
    problems: list[RetroError] = []
    for check in checks:
        try:
            check()
        except RetroError as error:
            problems += error.problems
    raise_problems(problems)


_CHECK_PATH = "Check the path"
_CHECK_RIGHTS = "Check the permissions of the file and of the directories above it"
_CHECK_DISK = "Check the file system, then repeat the command"
_OPEN_FEWER = "Raise the limit of open files (ulimit -n)"
_FREE_SPACE = "Free space or enlarge the quota, then repeat the command"
_REFUSALS = {
    errno.EACCES: _CHECK_RIGHTS,
    errno.EPERM: _CHECK_RIGHTS,
    errno.EROFS: "Name a place that can be written to",
    errno.ENOENT: _CHECK_PATH,
    errno.EISDIR: _CHECK_PATH,
    errno.ENOTDIR: _CHECK_PATH,
    errno.ELOOP: _CHECK_PATH,
    errno.ENAMETOOLONG: _CHECK_PATH,
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _CHECK_DISK,
    errno.EMFILE: _OPEN_FEWER,
    errno.ENFILE: _OPEN_FEWER,
    errno.ESTALE: _CHECK_DISK,
    errno.EIO: _CHECK_DISK,
}


def system_refusal(error: BaseException) -> SystemRefusal | None:
    """Convert an operating system error about a file for the user; None for other errors.

    An error that names no file may be a bug of ours, so it keeps its traceback.
    """
    if not isinstance(error, OSError) or error.errno not in _REFUSALS or error.filename is None:
        return None
    name = error.filename if isinstance(error.filename, str | bytes) else str(error.filename)
    subject = name.decode(errors="replace") if isinstance(name, bytes) else name
    found = error.strerror or type(error).__name__
    return SystemRefusal(subject, found, _REFUSALS[error.errno])
