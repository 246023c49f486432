"""Errors that end a run with a message for its user, beside ValueError and OSError."""


class RunError(RuntimeError):
    """The command line prints its message and exits with 1."""


class EngineError(RunError):
    """The engine does not sample from the policy that is trained."""


class RewardError(RunError, ValueError):
    """The reward function fails on everything it is given."""


class MidStepError(RunError):
    """A later update of a step went wrong: the weights are those of no whole step."""


class RankError(RunError):
    """Another rank failed; the message is its own."""
