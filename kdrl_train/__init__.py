"""A thin KDRL and GRPO trainer on top of kdrl_kernels. Start: `python -m kdrl_train --help`."""
