"""Puts the head into ms-swift: swift rlhf --rlhf_type grpo or gkd, --external_plugins PLUGIN."""

from pathlib import Path

from kdrl_kernels.integrations.versions import require

require("ms-swift", "4.6", "pip install 'ms-swift==4.6.*' msgspec")

PLUGIN = str(Path(__file__).with_name("plugin.py"))
"""The file for --external_plugins, which replaces the trainers of GRPO and GKD."""
