"""Prints the table of integrations/swift/README.md: what ms-swift prints, and with ours.

`python -m tests.integrations.swift_table`, in the environment of tests/swift.sh.
"""

import tempfile
from pathlib import Path

from tests.integrations.swift_runs import train

Options = dict[str, str | None]
TEACHER: Options = {"teacher_model": "teacher"}
ROWS: dict[str, tuple[str, Options]] = {
    "grpo": ("grpo", {}),
    "grpo, 2 updates of a rollout": ("grpo", {"num_iterations": "2"}),
    "dapo": ("grpo", {"loss_type": "dapo"}),
    "cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": "5"}),
    "sequence level": ("grpo", {"importance_sampling_level": "sequence"}),
    "OPD-RL": ("grpo", TEACHER),
    "OPD-RL without rewards": ("grpo", TEACHER | {"reward_funcs": None}),
    "GKD, beta 0": ("gkd", {"beta": "0"}),
    "GKD, beta 0.5": ("gkd", {"beta": "0.5"}),
    "GKD, beta 1, on-policy": ("gkd", {"beta": "1", "lmbda": "1"}),
    "GKD, 5 best tokens": ("gkd", {"gkd_logits_topk": "5"}),
}
NAMES = ("loss", "grad_norm", "kl", "teacher_kl")


def cells(kind: str, options: Options, plugin: str | None) -> list[str]:
    """Return the numbers of the third step as ms-swift prints them, of four digits."""
    with tempfile.TemporaryDirectory() as folder:
        step = train(Path(folder), kind, plugin=plugin, **options).log[-1]
    return [f"{step[name]:.4g}" if name in step else "" for name in NAMES]


def main() -> None:
    """Print the table."""
    lines = [f"| run | {' | '.join(NAMES)} |", "|---|" + "---|" * len(NAMES)]
    for name, (kind, options) in ROWS.items():
        pairs = zip(cells(kind, options, None), cells(kind, options, "yes"), strict=True)
        numbers = [f"{host} / {ours}" if host else "" for host, ours in pairs]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
