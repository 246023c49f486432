"""Errors that end a run with a message for its user, beside ValueError and OSError."""


class RunError(RuntimeError):
    """The command line prints its message and exits with 1."""


class EngineError(RunError):
    """The engine does not sample from the policy that is trained."""


class RankError(RunError):
    """Another rank failed; the message is its own."""
