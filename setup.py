"""Metadata of the distribution `m2mkd_ds`: names, versions, requirements, files. Tools are configured in pyproject.toml.

Two source roots: `m2mkd_ds/` here and `m2mkd_kernels/` under `kernels/` (the bare name `kernels` is another project's
package). `ds_configs/` is a top-level folder for people to read; a wheel carries it as `m2mkd_ds/_ds_configs/`.
"""

from setuptools import find_packages, setup

# Read by scripts/requirements.py without running this file: keep both lists literal.
INSTALL_REQUIRES = [
    "torch>=2.11",
    "torchvision>=0.26",  # the release that belongs to torch 2.11; a mismatched pair fails at import
    "timm>=1.0.23",  # the first whose init_weights resets every part
    "deepspeed>=0.19.8,<0.20",  # 0.19 removed and renamed features between patch releases; each new minor is to be tried
    "webdataset>=1.0.2",
    "transformers>=5.0",
    "huggingface_hub>=1.3",
    "accelerate>=1.10",
    "safetensors>=0.6.2",
    "numpy>=1.26",
    "pillow>=10.1,<13",  # Pillow 13 refuses posterize with 0 bits, which RandAugment of timm 1.0.31 asks for
    "scikit-learn>=1.4",
    "matplotlib>=3.8",
    "tyro>=1.0",
    "pydantic>=2.8",
    "pyyaml>=6.0.1",
    "rich>=13.7",
    "simplejpeg>=1.8",  # libjpeg-turbo in a wheel; data.decode=fast
    "urllib3>=2.2",  # range reads over http(s) on kept-alive connections
    "fsspec>=2024.6",  # s3://, gs:// and hf:// shards; torch brings it anyway
]
DEV_REQUIRES = [
    "ruff>=0.15",
    "mypy>=1.18",
    "pytest>=8.4",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "coverage>=7.6",
    "setuptools>=77",  # builds the wheel that tests/scripts looks into
    "types-PyYAML",
    "resvg-py>=0.5",  # the extra `icons`
    "datasets>=4.0",  # the extra `datasets`
    "pyarrow>=26",  # the extra `teacher`, with the next two
    "xxhash>=3.5",
    "prometheus-client>=0.21",
    "trustme>=1.2",  # certificates for tests of mutual TLS
    "onnx>=1.19",  # the extra `onnx`, with the next two
    "onnxscript>=0.5",
    "onnxruntime>=1.22",
    "tensorboard>=2.18",  # the extras of the trackers, with the next two
    "wandb>=0.22",
    "trackio>=0.10",
]
EXTRAS = {
    "s3": ["s3fs>=2024.6"],
    "gs": ["gcsfs>=2024.6"],
    "icons": ["resvg-py>=0.5"],
    "datasets": ["datasets>=4.0"],
    "teacher": ["pyarrow>=26", "xxhash>=3.5", "prometheus-client>=0.21"],  # pyarrow 25 leaks every Flight server (arrow 50684)
    "onnx": ["onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.22"],
    "tensorboard": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.22"],
    "trackio": ["trackio>=0.10"],
}

ROOM_PACKAGES = find_packages(include=["m2mkd_ds", "m2mkd_ds.*"])
KERNEL_PACKAGES = find_packages("kernels", include=["m2mkd_kernels", "m2mkd_kernels.*"])


def read(path: str) -> str:
    """Text of a file beside this one."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def version() -> str:
    """The `__version__` line of the package, read without importing it."""
    for line in read("m2mkd_ds/__init__.py").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise ValueError('m2mkd_ds/__init__.py has no line `__version__ = "..."`')


setup(
    name="m2mkd_ds",
    version=version(),
    description="Module-to-module distillation of a pretrained ViT into a sparse Vision-MoE, on DeepSpeed",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*ROOM_PACKAGES, "m2mkd_ds._ds_configs", *KERNEL_PACKAGES],
    package_dir={"m2mkd_ds._ds_configs": "ds_configs", "m2mkd_kernels": "kernels/m2mkd_kernels"},
    package_data={
        "m2mkd_ds": ["py.typed"],
        "m2mkd_ds._ds_configs": ["*.json", "*.md"],
        "m2mkd_ds.checkpoint": ["hf_template/*"],
        "m2mkd_ds.report": ["*.css", "*.html"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require={"dev": DEV_REQUIRES, **EXTRAS},
    entry_points={"console_scripts": ["m2mkd = m2mkd_ds.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
