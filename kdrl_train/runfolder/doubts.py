"""Notices, from its records, that a run has stopped to learn although no step fails."""

from kdrl_train.runfolder.jsonl import Record

ZERO_STEPS = 3
"""Steps in a row with a gradient of 0 after which a run is warned."""
STILL = 0.005
"""Gradient norm below which the screen shows 0.00. It counts as 0 at a DEAD entropy alone: how
large it is where a policy learns depends on the model."""
DEAD = 1e-6
"""Entropy, in nats per token, of a policy that draws one token alone, and so sees no other."""
SILENT_STEPS = 100
"""Steps in a row without a group of mixed rewards after which a run is warned."""
LATE_SHARE = 0.1
"""Share of a step's completions whose reward was not ready in time, from which a run is warned."""
OUTCOMES = ("right", "wrong", "unparseable", "timeout", "error")
NOISY_STEPS = 3
"""Steps in a row above NOISY after which a run is warned."""
NOISY = 0.5
"""sketch_noise that makes the square of a gradient a quarter larger."""
SATURATED = 0.1
"""Entropy, in nats per token, below which a policy hardly samples anything else any more."""


class Doubts:
    """Counts steps from which the policy cannot have learnt; says each thing once."""

    def __init__(self) -> None:
        self.zero_steps = self.silent_steps = self.noisy_steps = 0
        self._said: set[str] = set()

    def add(self, record: Record) -> list[str]:
        """Take a step's record; returns what to warn of."""
        silent = record.get("groups_with_signal") == 0 and bool(record.get("policy_coef"))
        entropy = record.get("entropy")
        # without signal and teacher a gradient of 0 is right; `silent_steps` counts it
        idle = silent and not record.get("kd_share") and (entropy or 0) > SATURATED
        norm = record.get("grad_norm")
        dead = entropy is not None and entropy < DEAD and norm is not None and norm < STILL
        zero = dead or (norm == 0 and not idle)
        self.zero_steps = self.zero_steps + 1 if zero else 0
        self.silent_steps = self.silent_steps + 1 if silent else 0
        doubts = []
        if self.zero_steps == ZERO_STEPS and self._first("zero"):
            doubts.append(
                f"|g| must not stay 0, got {norm:.2g} in {ZERO_STEPS} steps up to step "
                f"{record['step'] + 1} (entropy "
                f"{entropy if entropy is None else f'{entropy:.3f}'} nats, signal "
                f"{record['groups_with_signal']:.0%}): the policy does not change any more. A "
                "large optim.learning_rate saturates it: look at entropy and reward from the step "
                "where they jump, and start from the checkpoint before it with a lower one"
            )
        if self.silent_steps == SILENT_STEPS and self._first("silent"):
            doubts.append(
                f"some prompt must have both better and worse completions, got none in "
                f"{SILENT_STEPS} steps up to step {record['step'] + 1} (signal 0%, reward "
                f"{record['reward']:.3f}): the policy gradient is 0. Take problems of another "
                "difficulty or a larger sampling.group_size, run sft first, or read samples/: does "
                "reward.function see the answers?"
            )
        noise = record.get("sketch_noise") or 0
        self.noisy_steps = self.noisy_steps + 1 if noise > NOISY else 0
        if self.noisy_steps == NOISY_STEPS and self._first("noise"):
            doubts.append(
                f"sketch_noise should be below 0.1, got {noise:.2f} at step {record['step'] + 1} "
                f"and above {NOISY} in {NOISY_STEPS} steps: lower model.head_threshold, or set "
                "model.head_backward to exact"
            )
        judged = sum(record.get(f"verifier_{outcome}", 0) for outcome in OUTCOMES)
        late = record.get("verifier_timeout", 0)
        if late > LATE_SHARE * judged and self._first("late"):
            doubts.append(
                f"rewards must be ready within reward.timeout_s, got {late} of {judged} "
                f"completions of step {record['step'] + 1} that were not: they are paid 0. Make "
                "reward.function faster, or raise reward.timeout_s"
            )
        return doubts

    def _first(self, name: str) -> bool:
        """Say whether a doubt is new."""
        new = name not in self._said
        self._said.add(name)
        return new
