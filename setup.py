"""Installation of fairseq-earm. `make setup` also installs fairseq and pinned versions of everything."""
from setuptools import find_packages, setup

setup(
    name="fairseq-earm",
    version="0.1.0",
    description="Autoregressive models trained as their own energy-based models, as a fairseq plugin",
    license="MIT",
    packages=find_packages(include=["fairseq_earm", "fairseq_earm.*"]),
    python_requires=">=3.9,<3.13",
    # fairseq is an extra: two projects on PyPI install that package, and pip would put one over the other.
    install_requires=["torch>=1.13.1", "numpy", "sacrebleu>=2.0", "tqdm"],
    extras_require={
        "fairseq": [
            "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
            "fairseq==0.12.2; python_version < '3.11'",
        ],
        "plots": ["matplotlib"],
        "evaluation": ["nltk", "rouge-score", "sacremoses"],  # fairseq-earm-evaluate's METEOR, ROUGE and --detokenize
        "tensorboard": ["tensorboard"],  # curves from what fairseq-train --tensorboard-logdir wrote
        "test": ["pytest", "pytest-cov", "pytest-xdist", "hypothesis"],
    },
    entry_points={
        "console_scripts": [
            "fairseq-earm-analyse = fairseq_earm.cli.analyse:main",
            "fairseq-earm-evaluate = fairseq_earm.cli.evaluate:main",
            "fairseq-earm-exposure-bias = fairseq_earm.cli.exposure_bias:main",
            "fairseq-earm-next = fairseq_earm.cli.next_token:main",
            "fairseq-earm-perplexity = fairseq_earm.cli.perplexity:main",
            "fairseq-earm-report = fairseq_earm.cli.report:main",
            "fairseq-earm-sample = fairseq_earm.cli.sample:main",
            "fairseq-earm-tune = fairseq_earm.cli.tune:main",
        ]
    },
)
