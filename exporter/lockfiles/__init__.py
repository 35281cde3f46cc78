"""Read lock files: which packages a build may fetch, from where, and with which digests.

No database, no network, and nothing of a lock file is executed. One module for each family of
formats; `formats` lists them all.
"""

from .formats import FORMATS, LockFile, LockFileError, read_lock_file
from .locked import SHA256, Digest, LockedFile, LockedPackage, MalformedError, Unchecked

__all__ = [
    "FORMATS",
    "SHA256",
    "Digest",
    "LockFile",
    "LockFileError",
    "LockedFile",
    "LockedPackage",
    "MalformedError",
    "Unchecked",
    "read_lock_file",
]
