"""A tiny parallel text, a model trained on it and fairseq's commands run inside this process."""
import contextlib
import importlib
import io
import json
import logging
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

PLUGIN = str(Path(__file__).resolve().parents[1] / "fairseq_earm")
WORDS = "a b c d e f g h".split()
ARCH = (
    "--arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2 "
    "--share-decoder-input-output-embed --dropout 0.1 "
).split()
OPTIMISATION = (
    "--optimizer adam --lr 0.02 --clip-norm 1.0 --batch-size 32 --max-epoch 4 --cpu --no-progress-bar "
    "--no-epoch-checkpoints --num-workers 0 --log-format simple "
).split()


def command(name, *arguments, stdin=""):
    """Run `fairseq-{name}` here, with the plugin, and return what it printed."""
    module = importlib.import_module(f"fairseq_cli.{name}")
    plugin = [] if "--user-dir" in arguments or name == "preprocess" else ["--user-dir", PLUGIN]
    argv = [f"fairseq-{name}", *map(str, arguments), *plugin]
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "stdin", io.StringIO(stdin)):
        # fairseq-validate takes every other handler from the log, those that a test reads among them.
        with contextlib.redirect_stdout(printed), mock.patch.object(module, "reset_logging", create=True):
            module.cli_main()
    return printed.getvalue()


class Run(NamedTuple):
    """What a training run left behind: its folder and its log."""

    folder: Path
    records: list

    def log(self, tag="train_inner"):
        """The JSON entries of one kind, numbers as numbers: `train_inner` has one for each update."""
        lines = [r.getMessage() for r in self.records if r.name == tag and r.getMessage().startswith("{")]
        return [{key: float(value) for key, value in json.loads(line).items() if value is not None} for line in lines]

    def warnings(self):
        return [r.getMessage() for r in self.records if r.levelno == logging.WARNING]

    def checkpoint(self, name="checkpoint_last.pt"):
        return torch.load(self.folder / name, map_location="cpu", weights_only=False)


@contextlib.contextmanager
def recorded_log():
    """The list of all records logged meanwhile."""
    records, root = [], logging.getLogger()
    handler, level = logging.Handler(), root.level
    handler.emit = records.append
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield records
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def train_arguments(tiny, folder, *arguments, arch=ARCH, validate=False):
    """Arguments of `fairseq-train` for a short run that logs each update as JSON; later ones win over earlier ones."""
    log = ["--log-format", "json", "--log-interval", 1, *([] if validate else ["--disable-validation"])]
    return [tiny.data, "--save-dir", folder, *arch, *OPTIMISATION, *log, "--task", "translation", *arguments]


def train(tiny, folder, *arguments, **options):
    """Run `fairseq-train` here, see `train_arguments`."""
    with recorded_log() as records:
        command("train", *train_arguments(tiny, folder, *arguments, **options))
    return Run(folder, records)


def used_weights(state):
    """A model's state without what stock fairseq keeps there and never trains: an uninitialised buffer, whose dtype and
    device alone matter, and a copy of encoder weights for inference, brought up to date only by loading."""
    unused = re.compile(r"\._float_tensor$|\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")
    return {name: weight for name, weight in state.items() if not unused.search(name)}


def same_state(one, other):
    """Whether two checkpoints hold the same weights and the same optimizer state, bit for bit."""
    moments = [run["last_optimizer_state"]["state"] for run in (one, other)]
    if one["model"].keys() != other["model"].keys() or moments[0].keys() != moments[1].keys():
        return False
    weights = [used_weights(run["model"]) for run in (one, other)]
    pairs = [(weights[0][key], weights[1][key]) for key in weights[0]]
    pairs += [(moments[0][key][name], moments[1][key][name]) for key in moments[0] for name in ("exp_avg", "exp_avg_sq")]
    return all(torch.equal(a, b) for a, b in pairs)


def generate(tiny, *arguments, models="a", subset="test", task="earm_translation"):
    """What `fairseq-generate` prints for a subset, with the model `a`, `b` or the ensemble `ab`; stock tasks keep all sentences too."""
    paths = ":".join(str(getattr(tiny, name)) for name in models)
    keep = ["--required-batch-size-multiple", 1] if task == "translation" else []
    where = [tiny.data, "--path", paths, "--task", task, "--gen-subset", subset, *keep]
    return command("generate", *where, "--cpu", "--num-workers", 0, "--max-len-b", 12, "--no-progress-bar", *arguments)


def tagged(printed, tag):
    """{sentence: its lines of one kind in the order printed, without the tag} of `fairseq-generate`'s output."""
    found = {}
    for line in printed.splitlines():
        name, _, rest = line.partition("\t")
        kind, _, number = name.partition("-")
        if kind == tag and number.isdigit():
            found.setdefault(int(number), []).append(rest)
    return found


def sentence_pair(rng):
    """Target: the source's words from last to first, each kept, doubled or replaced by x."""
    source = [rng.choice(WORDS) for _ in range(rng.randint(1, 6))]
    target = [w for word in reversed(source) for w in rng.choice([[word], [word], [word, word], ["x"]])]
    return " ".join(source), " ".join(target)


def write_text(folder, sizes, seed=0):
    rng = random.Random(seed)
    for split, size in sizes.items():
        pairs = [sentence_pair(rng) for _ in range(size)]
        for side, language in enumerate(("src", "tgt")):
            (folder / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))


def build_adaptive(tiny, folder):
    """A model with an adaptive softmax, trained by cross-entropy for an epoch and by E-ARM for another."""
    untied = [flag for flag in ARCH if flag != "--share-decoder-input-output-embed"]
    softmax = ["--adaptive-softmax-cutoff", "6,10", "--adaptive-softmax-factor", 2]
    earm = ["--criterion", "earm_cross_entropy", "--earm-start-epoch", 2, "--earm-weight", 1, "--max-epoch", 2]
    return train(tiny, folder, "--task", "earm_translation", *earm, arch=[*untied, *softmax])


def build(folder):
    """Text of 403, 60 and 7 sentences, binarised, with two models `a` and `b` trained by task `earm_translation`."""
    write_text(folder, {"train": 403, "valid": 60, "test": 7})
    data = folder / "data"
    prefixes = [f"--{s}pref={folder / s}" for s in ("train", "valid", "test")]
    command("preprocess", "-s", "src", "-t", "tgt", *prefixes, "--destdir", data, "--workers", 1)
    models = {}
    for seed, name in enumerate("ab", start=1):
        save = ["--save-dir", folder / name, "--seed", seed, "--criterion", "cross_entropy"]
        command("train", data, "--task", "earm_translation", *ARCH, *OPTIMISATION, *save)
        models[name] = folder / name / "checkpoint_last.pt"
    return SimpleNamespace(folder=folder, data=data, **models)
