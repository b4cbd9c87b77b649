"""The one exception tree. Every class carries the exit code that the command line ends with.

Each error takes one message that names the value, the limit and the remedy; one string argument keeps
them picklable across Ray processes.
"""


class LecternError(Exception):
    """Base of all errors that are ours to explain; shown as one message, never as a traceback."""

    exit_code = 1


class InputError(LecternError):
    """The config or an input is wrong; nothing was spent."""

    exit_code = 2


class IdentityError(InputError):
    """A dataset was captured by another teacher, tokenizer or setting than expected."""


class IntegrityError(InputError):
    """A stored object is missing, truncated, altered or out of contract."""


class StorageError(LecternError):
    """A store failed while running: disk full, no permission, network gone."""


class WorkerError(LecternError):
    """A teacher replica or a trainer rank failed and retries did not help."""


class BudgetError(LecternError):
    """A spending cap stopped the run; the dataset is valid and resumable."""

    exit_code = 3
