"""Errors that a user can mend: each names its subject, what was found, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

#: Exit code of a command that stops on one of these errors.
EXIT_CODE = 2


class RetroError(Exception):
    """Base of every error that the user's input causes.

    Args:
        subject: The file, flag, field or argument at fault, as the user would write it.
        found: What is there.
        mend: What was expected, or how to mend it.

    Attributes:
        raised_together: Whether every rank raises it, so that one of them may report it.
    """

    raised_together = False

    def __init__(self, subject: object, found: str = "", mend: str = "") -> None:
        # Megatron re-raises what a module's forward raised as `type(error)(message)`: then
        # `subject` is the whole message.
        self.subject, self.found, self.mend = str(subject), found, mend
        super().__init__(f"{self.subject}: {found}. {mend}" if found or mend else self.subject)

    def __reduce__(self) -> tuple:
        # Exceptions travel between ranks pickled; the default would pass the message alone.
        return type(self), (self.subject, self.found, self.mend)


class ConfigurationError(RetroError):
    """A flag or a configuration field has a value that cannot work."""


class CorpusError(RetroError):
    """The input text is missing, empty or malformed."""


class TokenizerError(RetroError):
    """A tokenizer cannot be loaded, or is not the project's."""


class ProjectError(RetroError):
    """A project directory lacks a stage, or belongs to another configuration."""


class CorruptFileError(ProjectError):
    """A file of the project is truncated, altered or of another format."""


class CheckpointError(RetroError):
    """A checkpoint cannot be read, or does not fit the model."""


class ShapeError(RetroError):
    """A tensor does not have the shape that the model's configuration implies."""


class MissingDependencyError(RetroError):
    """An optional package is needed and not installed."""


class SystemRefusal(RetroError):
    """The operating system refused to read or to write a file."""


class SeveralErrors(ConfigurationError):
    """More than one thing is wrong with one configuration; all of them are told together.

    Attributes:
        problems: The errors, in the order in which they were found.
    """

    def __init__(self, problems: Sequence[RetroError | str]) -> None:
        problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple:
        return type(self), (list(self.problems),)


def raise_problems(problems: Sequence[RetroError]) -> None:
    """Raise what was found: nothing, the one problem itself, or all of them as one error.

    Raises:
        RetroError: the only problem.
        SeveralErrors: more than one.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise SeveralErrors(problems)


def check_all(*checks: Callable[[], object]) -> None:
    """Run every check, whatever the others find, and raise all that they find together.

    Raises:
        RetroError: the only problem.
        SeveralErrors: more than one.
    """
    problems: list[RetroError] = []
    for check in checks:
        try:
            check()
        except RetroError as error:
            problems += getattr(error, "problems", (error,))
    raise_problems(problems)


_CHECK_PATH = "Check the path"
_CHECK_RIGHTS = "Check the rights of the file and of the directories above it"
_SEE_TO_DISK = "See to the file system, then repeat the command"
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
    errno.EFBIG: _SEE_TO_DISK,
    errno.EMFILE: _OPEN_FEWER,
    errno.ENFILE: _OPEN_FEWER,
    errno.ESTALE: _SEE_TO_DISK,
    errno.EIO: _SEE_TO_DISK,
}


def system_refusal(error: BaseException) -> SystemRefusal | None:
    """What the system said of a file, for the user; None if it is no such error.

    An error that names no file may be a fault of ours, and keeps its traceback.
    """
    if not isinstance(error, OSError) or error.errno not in _REFUSALS or error.filename is None:
        return None
    name = error.filename if isinstance(error.filename, str | bytes) else str(error.filename)
    subject = name.decode(errors="replace") if isinstance(name, bytes) else name
    found = error.strerror or type(error).__name__
    return SystemRefusal(subject, found, _REFUSALS[error.errno])
