"""The errors a user sees: each says what was found, what was expected, and the remedy."""

from __future__ import annotations


class EdgedistillError(Exception):
    """A job failed for a reason the user can act on. The command line prints it and exits with ``exit_code``.

    ``told``: another process of the same launch prints it.
    """

    exit_code = 1
    told = False


class UsageError(EdgedistillError):
    """The options contradict each other or name something that does not exist."""

    exit_code = 2


class ImageError(EdgedistillError):
    """One image cannot be read: damaged, truncated, too large or in a format nobody here reads."""


class DataError(EdgedistillError):
    """The data set as a whole cannot be used: labels, splits, groups or columns are wrong."""


class ArtifactError(EdgedistillError):
    """A file of a run is missing, damaged, of another format version or of another data set."""


class ModelError(EdgedistillError):
    """A network cannot be built, loaded or deployed."""
