"""The errors, besides ValueError and OSError, that end a run with a message for its user."""


class RunError(RuntimeError):
    """An error whose message the command line prints before it exits with 1."""


class EngineError(RunError):
    """The engine does not sample from the policy that is being trained."""


class RewardError(RunError, ValueError):
    """The reward function failed on every completion of a prompt."""


class MidStepError(RunError):
    """An update of a step failed after an earlier one: the weights belong to no whole step."""


class BrokenWeightsError(MidStepError, FloatingPointError):
    """An update left weights, or moments of AdamW, that are not finite: they are never saved."""


class RankError(RunError):
    """Some rank failed; the message names that rank and repeats its error."""
