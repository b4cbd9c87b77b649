"""What a store's failure means: whether to try again, and one clear message that holds no secret."""

import errno
import os
import re

from storage.backends import error_code
from storage.errors import IntegrityError, LecternError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM}
_FINAL = _FULL | _DENIED | {
    errno.EROFS,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
}  # fmt: skip
_CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "RefreshError",
    "DefaultCredentialsError",
}
_CREDENTIAL_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
_CLIENT_PACKAGES = {
    "botocore",
    "aiobotocore",
    "aiohttp",
    "s3fs",
    "gcsfs",
    "google",
    "requests",
    "urllib3",
    "azure",
    "adlfs",
}


def is_store_failure(error: BaseException) -> bool:
    """Tell whether an exception came from the system or a store's client, as opposed to a defect in the code."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENT_PACKAGES


def is_transient(error: BaseException) -> bool:
    """Tell whether trying again may help: time-outs, resets, throttling, 5xx, short bodies."""
    if not is_store_failure(error) or _is_about_credentials(error):
        return False
    if isinstance(error, PermissionError | FileNotFoundError | FileExistsError):
        return False
    return getattr(error, "errno", None) not in _FINAL and type(error).__name__ != "ParamValidationError"


def explain(error: BaseException, action: str, where: str) -> LecternError:
    """Return our error for a store's failure.

    The store's own text is left out where it may quote a credential; `where` must already be redacted.
    """
    number = getattr(error, "errno", None)
    code = error_code(error)
    if code == "NoSuchBucket":
        return StorageError(f"cannot {action} {where}: the bucket does not exist; create it or mend the URL")
    if isinstance(error, FileNotFoundError):
        return IntegrityError(f"cannot {action} {where}: it is missing")
    if _is_about_credentials(error):
        return StorageError(
            f"cannot {action} {where}: the store does not accept the credentials ({code or type(error).__name__}); "
            "set valid ones in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the "
            "store's own variables)"
        )
    if isinstance(error, PermissionError) or number in _DENIED:
        return StorageError(
            f"cannot {action} {where}: permission denied{f' ({code})' if code else ''}; allow this user or these "
            "credentials to read and write there, or choose another place"
        )
    if number in _FULL:
        return StorageError(
            f"cannot {action} {where}: {os.strerror(number)}; free some space and run again, what was committed "
            "before is intact"
        )
    if number == errno.EROFS:
        return StorageError(f"cannot {action} {where}: the filesystem is read-only; choose another place")
    return StorageError(f"cannot {action} {where}: {_text(error)}")


def redact(url: str) -> str:
    """Return a URL without user, password and query, fit to be shown."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).split("?", 1)[0] if "://" in url else url


def _is_about_credentials(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & _CREDENTIAL_ERRORS) or error_code(error) in _CREDENTIAL_CODES


def _text(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
