"""The exceptions of raysys. Every one survives a Ray process border.

    RaysysError
    |-- ConfigError (ValueError)      a setting, flag or URI is wrong
    |-- SchemaError (ValueError)      a file, column, type or request field is wrong
    |-- BundleError                   something about a published version
    |   |-- BundleNotFound
    |   |-- BundleCorrupt             checksum or content does not match the manifest
    |   `-- BundleIncompatible        written by another format version
    |-- StateError                    event log or user state cannot be used
    |   `-- StateBehind               the state lacks records that the log has
    |-- ServeOverloaded               shed; the client may retry later
    |-- DeadlineExceeded              the request ran out of time
    `-- StageUnavailable              a stage failed too often in a row and is left alone for a moment

Messages say what was expected, what was found and what to do. Arguments reach
`super().__init__` unchanged, because an exception that does not pass them on
cannot be unpickled and turns into a TypeError in the driver.
"""


class RaysysError(Exception):
    """Base of all errors a user of raysys can meet."""


class ConfigError(RaysysError, ValueError):
    """A setting, flag or URI is wrong."""


class SchemaError(RaysysError, ValueError):
    """A file, column, type or request field is not what the contract says."""


class BundleError(RaysysError):
    """Something is wrong with a bundle or a registry."""


class BundleNotFound(BundleError):
    """No such bundle or version."""


class BundleCorrupt(BundleError):
    """A bundle's content does not match its manifest."""


class BundleIncompatible(BundleError):
    """A bundle has another format version than this code reads."""


class StateError(RaysysError):
    """The event log or the user state cannot be opened or written."""


class StateBehind(StateError):
    """The state lacks records that the log has; a replay brings them back."""


class ServeOverloaded(RaysysError):
    """The service sheds load; the client may retry."""


class DeadlineExceeded(RaysysError):
    """A request ran out of its time budget."""


class StageUnavailable(RaysysError):
    """A stage of an answer failed too often in a row and is not asked for a moment."""
