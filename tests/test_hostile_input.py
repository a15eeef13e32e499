"""Damaged files, whatever is wrong with them, are read as far as they can be, or refused in one line.

FAIRSEQ_EARM_FUZZ=N has N inputs tried in all, 1,700 by default; `make fuzz` 16,000.
"""
import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_earm.cli import analyse, text_report
from fairseq_earm.cli.common import check_json, text_dictionary, write_json
from fairseq_earm.cli.evaluated_texts import read_texts
from fairseq_earm.cli.nbest import read_nbest
from fairseq_earm.cli.result_tables import result_tables
from fairseq_earm.evaluation import page, report_tables, run_folder
from fairseq_earm.evaluation.generated import read_generated
from fairseq_earm.evaluation.score_tables import latex_table, text_table
from fairseq_earm.evaluation.training_log import read_log, read_run
from fairseq_earm.evaluation.work_file import WorkFile
from fairseq_earm.sampling.frozen import file_hash
from fairseq_earm.sampling.store import SampleStore
from fairseq_earm.sampling.store_settings import SETTINGS, dictionary_hash
from fairseq_earm.sampling.store_writer import StoreWriter
from fairseq_earm.tasks.image_files import read_image_files
from tests.damage import damaged_bytes, damaged_json, limits, read_or_refuse

IN_ALL = int(os.environ.get("FAIRSEQ_EARM_FUZZ") or 1700)
SAMPLES, PREFIX, LENGTH = 3, 2, 5


class Target(NamedTuple):
    """A file and its reader.

    Attributes:
        name: of the file.
        whole: what it holds before it is damaged.
        read: folder, path → what is read; it may look at that, and fail.
        damage: strategy of what is put there instead.
    """

    name: str
    whole: bytes
    read: Callable
    damage: Callable = damaged_bytes


# --- samples ----------------------------------------------------------------------------------------------------------


class Sequences:
    """As much of `Blocks` as a store asks for."""

    sequence_length = LENGTH

    def __len__(self):
        return 7

    def fingerprint(self):
        return "a" * 64


def dictionary():
    words = Dictionary()
    for number in range(20):
        words.add_symbol(f"w{number}")
    return words


STORED = {
    "split": "test", "dictionary_sha256": dictionary_hash(dictionary()), "prefix_length": PREFIX, "sequence_length": LENGTH,
    "sample_break_mode": "none", "sequences": 7, "text_sha256": "a" * 64, "checkpoint_sha256": "0" * 64, "samples": SAMPLES,
    "temperature": 1.0, "sampling_topk": -1, "sampling_topp": -1.0, "seed": 1, "batch_size": 3, "dtype": "float32", "device": "cpu",
    "num_shards": 1, "shard_id": 0,
}
TOKENS = np.random.default_rng(1).integers(4, 24, (7, SAMPLES, LENGTH - PREFIX))


def write_store(folder, **changes):
    """Files of a store by name; each shard is written by a writer of its own."""
    for shard in range(changes.get("num_shards", 1)):
        writer = StoreWriter(
            str(folder / "test"), {**STORED, **changes, "shard_id": shard}, checkpoint="base.pt", dictionary_size=24
        )
        with writer:
            for first in writer.missing():
                writer.add(first, torch.from_numpy(TOKENS[list(writer.chunk(first))]).flatten(0, 1))
            writer.finish()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return {shards: write_store(tmp_path_factory.mktemp("store"), num_shards=shards) for shards in (1, 2)}


def read_store(folder, others):
    """What the samples are, where they are taken for whole, is what was drawn."""
    for name, content in others.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
    store = SampleStore.open(str(folder / "test"), Sequences(), dictionary=dictionary(), prefix_length=PREFIX)
    if (folder / "test.json").exists():
        record = json.loads((folder / "test.json").read_text())
        same = all(record[name] == STORED[name] for name in SETTINGS if name != "samples")
        if not same or record["samples"] != SAMPLES:
            return
    assert [store.all(index).tolist() for index in range(len(store))] == TOKENS.tolist()


def resume_store(folder, path, others):
    """Unfinished samples are gone on with, to what one run would have drawn."""
    (folder / "test.parts").mkdir(exist_ok=True)
    os.replace(path, folder / "test.parts" / path.name)
    for name, content in others.items():
        if not (folder / "test.parts" / name).exists():
            (folder / "test.parts" / name).write_bytes(content)
    with StoreWriter(str(folder / "test"), STORED, checkpoint="base.pt", dictionary_size=24) as writer:
        for first in writer.missing():
            writer.add(first, torch.from_numpy(TOKENS[list(writer.chunk(first))]).flatten(0, 1))
        writer.finish()
    read_store(folder, {})


def unfinished_parts():
    """Files of samples of which the last chunk is missing, by name."""
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(f"{folder}/test", STORED, checkpoint="base.pt", dictionary_size=24) as writer:
            for first in writer.missing()[:2]:
                writer.add(first, torch.from_numpy(TOKENS[list(writer.chunk(first))]).flatten(0, 1))
        return {path.name: path.read_bytes() for path in Path(folder, "test.parts").iterdir() if path.name != "lock"}


PARTS = unfinished_parts()


# --- records of unfinished work ---------------------------------------------------------------------------------------

RECORDS = {index: {"index": index, "base": [-0.5 * index, -1.25], "log_z": [[1.0, 2.0]]} for index in range(4)}


def write_work(folder):
    with WorkFile(str(folder / "work"), {"seed": 1, "samples": [10]}, flag="--json") as work:
        for record in RECORDS.values():
            work.add(record)
    return (folder / "work").read_bytes()


def read_work(folder, path):
    """What is taken over is what was written down; and it can be gone on with."""
    with WorkFile(str(path), {"seed": 1, "samples": [10]}, flag="--json") as work:
        assert all(RECORDS.get(index) == record for index, record in work.records.items())
        work.add({"index": 9, "base": []})
        kept = dict(work.records)
    with WorkFile(str(path), {"seed": 1, "samples": [10]}, flag="--json") as work:
        assert work.records == kept


# --- what fairseq printed ---------------------------------------------------------------------------------------------

GENERATED = """\
2026-01-01 | INFO | energy reranking: {"energy_weight": 1.0, "lenpen": 1.0, "select": "best"}
S-1\tx y
T-1\ta b c d e
H-1\t-0.5\ta b c d
D-1\t-0.5\ta b c d
P-1\t-1.0000 -1.0000 -1.0000 -1.0000 -0.5000
H-1\t-0.25\ta b c d e
D-1\t-0.25\ta b c d e
P-1\t-2.0000 -1.0000 -1.0000 -1.0000 -1.0000 -2.0000
S-0\tz
T-0\tf g h i
H-0\t0.0\tf g h i
D-0\t0.0\tf g h i
P-0\t-1.0000 -1.0000 -1.0000 -1.0000 -1.0000
H-0\t-inf\ti
D-0\t-inf\ti
P-0\t-0.1000 -0.1000
"""
LOG = """\
2026-01-01 10:00:00 | INFO | fairseq_cli.train | num. shared model params: 12,345 (num. trained: 12,345)
2026-01-01 10:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)
2026-01-01 10:00:01 | INFO | train_inner | {"epoch": 1, "update": 0.5, "loss": "4.2", "nll_loss": "4.1", "ups": "2", "num_updates": "4", "wall": "3"}
2026-01-01 10:00:02 | INFO | train_inner | epoch 001:      8 / 10 loss=4.5, ppl=22.6, num_updates=8, earm_loss=0.1, wall=9
2026-01-01 10:00:03 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 4.1 | ppl 17 | num_updates 8
2026-01-01 10:00:03 | INFO | train | epoch 001 | loss 4.4 | nll_loss 4.3 | num_updates 8 | wall 9
2026-01-01 10:00:04 | INFO | valid | {"epoch": 2, "valid_loss": "4.0", "valid_nll_loss": "3.9", "valid_num_updates": "16"}
2026-01-01 10:00:04 | INFO | train | {"epoch": 2, "train_loss": "4.0", "train_earm_dv": "0.1", "train_num_updates": "16"}
"""


def evaluated(path):
    args = argparse.Namespace(system=[["a", str(path)]], references=None, detokenize=None, tokenize=None, metrics=("bleu", "rouge"))
    return read_texts(args)


def tuned(path):
    nbest = read_nbest([str(path)])
    assert nbest.log_q.shape == nbest.log_mu.shape == nbest.lengths.shape and not np.isnan(nbest.log_mu).any()


def logged(folder, path):
    """Everything that a report says of a run with this log."""
    read_log(path)
    run_folder._facts([path])
    history = read_run([path])
    (folder / "run").mkdir(exist_ok=True)
    run = run_folder.read_run_folder(folder / "run", "run", [path])
    assert run.history == history or "nan" in str(history)
    report_tables.summary([run])
    report_tables.environment([run])


# --- JSON -------------------------------------------------------------------------------------------------------------

SPAN = {"greater": 3, "less": 2, "ties": 1, "ratio": 0.6, "interval": [0.5, 0.7]}
REPORTS = [
    {
        "conditions": "all", "base": {"nll": 1.0, "perplexity": 2.7}, "tokens": 100, "sequences": 5,
        "joint": [{"samples": 10, "perplexity_lower": 2.0, "perplexity_upper": 2.5, "gain": 0.1, "gain_standard_error": None}],
        "steps": [{"step": 1, "base": 2.0, "lower": 1.5, "upper": 1.6}, {"step": 2, "base": 2.0, "lower": 1.5, "upper": 1.6}],
    },
    {
        "best": {}, "sacrebleu_tokenize": "13a", "sentences": 10,
        "settings": [{"energy_weight": 0.1, "lenpen": 1.0, "bleu": 30.0, "interval": [29.0, 31.0], "gain": 0.5, "gain_interval": [0.1, 0.9]}],
    },
    {
        "pairs": 10, "not_reached": 3, "settings": {"a": "a.pt", "b": "b.pt"},
        **{m: {"own": SPAN, "reference": {**SPAN, "ratio": None}, "difference": SPAN} for m in ("probability", "rank")},
    },
    {
        "sentences": 3, "references": "T-lines", "signatures": ["x"], "notes": [],
        "systems": {"a": {"files": ["a"], "scores": {"BLEU": {"mean": 1.0, "standard_deviation": None, "seeds": [1.0]}}}},
        "bleu_by_length": [{"low": 0, "high": None, "sentences": 3, "bleu": {"a": None}}],
        "bootstrap": {"against": "a", "differences": {"b": {"BLEU": {
            "difference": 0.1, "low": 0.0, "high": 0.2, "p_value": 0.5, "sacrebleu_p_value": 0.2}}}},
    },
]
MEASURED = argparse.Namespace(data={"split": "test", "text": "ab12"})
MODELS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("base", "energy")}
PERPLEXITY = {**REPORTS[0], "settings": {**MODELS, **MEASURED.data}}
KEY = {"page": "p", "items": [{"item": 0, "line": 3, "left": "A"}, {"item": 1, "line": 4, "left": "B"}, {"item": 2, "line": 5, "left": "real"}]}
ANSWERS = {"page": "p", "rater": "me", "answers": {"0": "left", "1": "left", "2": "left"}}


def as_tables(folder, path):
    """A report's tables, on a page and in text, and what is JSON at all."""
    notes = []
    for _, report in run_folder._json_files([path], notes):
        for table in result_tables(report) or []:
            page.page(table.title, page.table(table.header, table.rows, table.title)).encode()
            text_table(table)
            latex_table(table)


def drawn_perplexity(folder, path):
    for name in ("base", "energy"):
        (folder / name).write_bytes(name.encode())
    args = argparse.Namespace(perplexity=str(path), path=str(folder / "base"), energy_path=str(folder / "energy"))
    found = text_report._read_perplexity(args, MEASURED)
    assert all(row["perplexity_lower"] > 0 for row in found["joint"]) and found["base"]["perplexity"] > 0


def counted(folder, answers, key):
    for name, content in (("answers", answers), ("key", key)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    args = argparse.Namespace(answers=[str(folder / "answers")], key=str(folder / "key"), allowed_failures=0, json=str(folder / "out.json"))
    analyse.count_votes(args)
    assert json.loads((folder / "out.json").read_text())["wins_a"] <= 2


# --- images -----------------------------------------------------------------------------------------------------------


def image_files():
    """Files of images by name, 4 of them in each."""
    images = np.random.default_rng(1).integers(0, 256, (4, 2, 3), dtype=np.uint8)
    idx = struct.pack(">4I", 0x803, 4, 2, 3) + images.tobytes()
    npz = io.BytesIO()
    np.savez(npz, train=images, valid=images[..., None])
    packed = io.BytesIO()
    np.savez_compressed(packed, x=images)
    batch = np.random.default_rng(2).integers(0, 256, (2, 3072), dtype=np.uint8)
    pickled = pickle.dumps({"data": batch, "labels": [1, 2]}, 2)
    return {
        "train-images-idx3-ubyte": idx, "t10k-images-idx3-ubyte.gz": gzip.compress(idx), "a.npz": npz.getvalue(), "b.npz": packed.getvalue(),
        "test_batch": pickled, "test_batch.bin": b"".join(b"\1" + row.tobytes() for row in batch),
        **{f"data_batch_{number}": pickled for number in range(1, 6)},
    }


IMAGES = image_files()
KINDS = {
    "train-images-idx3-ubyte": ["t10k-images-idx3-ubyte.gz"], "t10k-images-idx3-ubyte.gz": ["train-images-idx3-ubyte"], "a.npz": [], "b.npz": [],
    "data_batch_1": [f"data_batch_{number}" for number in range(2, 6)] + ["test_batch"],
    "test_batch.bin": [f"data_batch_{number}" for number in range(1, 6)],
}


def read_images(folder, path):
    for name in KINDS[path.name]:
        (folder / name).write_bytes(IMAGES[name])
    splits = read_image_files(str(folder))
    assert all(images.dtype == np.uint8 and images.ndim == 4 and images.size for images in splits.values())
    assert sum(images.size for images in splits.values()) < 1 << 20


# --- checkpoints and dictionaries -------------------------------------------------------------------------------------


def tiny_checkpoint():
    file = io.BytesIO()
    cfg = {"model": argparse.Namespace(arch="transformer", earm_weight=0.1), "task": {"_name": "translation", "data": "x"}}
    counts = np.array([1, 2])
    history = [{"num_updates": 3, "counts": counts}]
    torch.save({"cfg": cfg, "model": {"w": torch.zeros(2, 2)}, "optimizer_history": history}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def read_checkpoint(folder, path):
    notes = []
    checkpoint = run_folder._newest_checkpoint(folder, notes)
    assert (checkpoint is None) == bool(notes) and all("\n" not in note for note in notes)
    if checkpoint:
        run = run_folder.Run("run", folder, [], {}, {}, checkpoint, [], [], [], [])
        page.page("x", report_tables.summary([run]) + report_tables.settings([run])).encode()


def read_settings(folder, path):
    """Settings in a checkpoint that any tensors file may hold, on the page of a report."""
    try:
        cfg = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    torch.save({"cfg": cfg, "model": {"w": torch.zeros(2)}}, folder / "checkpoint_last.pt")
    read_checkpoint(folder, folder / "checkpoint_last.pt")


CFG = {
    "common": {"seed": 1, "bf16": False, "user_dir": None}, "task": {"_name": "earm_translation", "data": "x"}, "model": {"arch": "x"},
    "criterion": {"_name": "earm", "earm_weight": 0.1, "earm_control": False, "scheduled_sampling": "none"}, "optimization": {"lr": [0.1]},
}


@pytest.fixture(scope="module")
def groups(stores, tmp_path_factory):
    """Targets of a kind."""
    samples, work = [], write_work(tmp_path_factory.mktemp("work"))
    for files in stores.values():
        for name, content in files.items():
            def read(folder, path, others={key: value for key, value in files.items() if key != name}):
                return read_store(folder, others)

            samples.append(Target(name, content, read))
            if name.endswith(".json"):
                samples.append(Target(name, json.loads(content), read, damaged_json))
    return {
        "samples": samples,
        "unfinished": [
            *(Target(name, content, lambda folder, path: resume_store(folder, path, PARTS)) for name, content in PARTS.items()),
            Target("settings.json", STORED, lambda folder, path: resume_store(folder, path, PARTS), damaged_json),
            Target("work", work, read_work), Target("work", work, read_work),
        ],
        "printed": [
            Target("out", GENERATED.encode(), lambda folder, path: read_generated(str(path))),
            Target("out", GENERATED.encode(), lambda folder, path: evaluated(path)),
            Target("list", GENERATED.encode(), lambda folder, path: tuned(path)),
            Target("log", LOG.encode(), logged),
            Target("dict.txt", b"a 3\nb 2\nc 1 #fairseq:overwrite\n", lambda folder, path: text_dictionary(str(folder))),
        ],
        "JSON": [
            *(Target("report.json", report, as_tables, damaged_json) for report in REPORTS),
            Target("p.json", PERPLEXITY, drawn_perplexity, damaged_json),
            Target("answers", ANSWERS, lambda folder, path: counted(folder, None, KEY), damaged_json),
            Target("key", KEY, lambda folder, path: counted(folder, ANSWERS, None), damaged_json),
        ],
        "images": [Target(name, IMAGES[name], read_images) for name in KINDS],
        "checkpoints": [
            Target("checkpoint_last.pt", tiny_checkpoint(), read_checkpoint), Target("cfg", CFG, read_settings, damaged_json),
        ],
    }


TRIED = set()


@pytest.mark.parametrize("group", ["samples", "unfinished", "printed", "JSON", "images", "checkpoints"])
def test_damaged_files_are_read_or_refused_in_one_line(groups, group, monkeypatch):
    @settings(
        max_examples=IN_ALL // 6 + 1, deadline=None, database=None, derandomize=IN_ALL <= 1700,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def tried(data):
        target = data.draw(st.sampled_from(groups[group]))
        content = data.draw(target.damage(target.whole))
        TRIED.add((target.name, content))
        with tempfile.TemporaryDirectory() as folder, limits():
            path = Path(folder) / target.name
            path.write_bytes(content)
            read_or_refuse(target.read, path.parent, path)

    # That of a run's own file is in the report only as far as it says who they are.
    with contextlib.redirect_stdout(io.StringIO()):
        tried()


def test_so_many_were_tried(record_property):
    """The last of this file: how many different ones."""
    record_property("inputs", len(TRIED))
    print(f"{len(TRIED)} different damaged inputs")


@pytest.mark.parametrize("group", ["samples", "unfinished", "printed", "JSON", "images", "checkpoints"])
def test_what_is_whole_is_read(groups, group, tmp_path):
    """Or nothing above would mean anything."""
    for number, target in enumerate(groups[group]):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / target.name
        path.write_bytes(target.whole if isinstance(target.whole, bytes) else json.dumps(target.whole).encode())
        with contextlib.redirect_stdout(io.StringIO()):
            target.read(path.parent, path)


# --- what is no file at all -------------------------------------------------------------------------------------------


def strange_files(folder):
    """By name: paths that are not what a reader asks for."""
    (folder / "folder").mkdir()
    os.symlink(folder / "loop", folder / "loop")
    os.symlink(folder / "nowhere", folder / "dangling")
    (folder / "empty").write_bytes(b"")
    (folder / "latin1").write_bytes("Übung\n".encode("latin1"))
    (folder / "utf16").write_bytes("Übung\n".encode("utf-16"))
    long = folder / ("x" * 300)
    return {**{name: folder / name for name in ("folder", "loop", "dangling", "empty", "latin1", "utf16", "missing")}, "long": long}


def votes(path, key):
    counted_votes = argparse.Namespace(answers=[str(path)], key=str(key), allowed_failures=0, json=None)
    analyse.count_votes(counted_votes)


READERS = {
    "n-best": lambda folder, path: read_nbest([str(path)]),
    "generated": lambda folder, path: read_generated(str(path)),
    "log": lambda folder, path: read_run([path]),
    "run": lambda folder, path: run_folder.read_run_folder(path, "run"),
    "perplexity": drawn_perplexity,
    "answers": lambda folder, path: votes(path, folder / "empty"),
    "key": lambda folder, path: votes(folder / "empty", path),
    "texts": lambda folder, path: read_texts(argparse.Namespace(
        system=[["a", str(folder / "missing")]], references=[str(path)], detokenize=None, tokenize=None, metrics=("bleu",)
    )),
    "images": lambda folder, path: read_image_files(str(path)),
    "samples": lambda folder, path: SampleStore.open(str(path), Sequences(), dictionary=dictionary(), prefix_length=PREFIX),
    "checkpoint": lambda folder, path: file_hash(str(path), flag="--path"),
    "dictionary": lambda folder, path: text_dictionary(str(path)),
}
FINE = {("checkpoint", name) for name in ("empty", "latin1", "utf16")}


@pytest.mark.parametrize("what", ["folder", "loop", "dangling", "empty", "latin1", "utf16", "missing", "long"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_of_this_kind_is_refused(tmp_path, reader, what):
    path = strange_files(tmp_path)[what]
    found = read_or_refuse(READERS[reader], tmp_path, path)
    assert (found is not None) == ((reader, what) in FINE)


@pytest.mark.parametrize("what", ["folder", "loop", "missing"])
@pytest.mark.parametrize("name", ["test.bin", "test.idx", "test.json"])
def test_a_part_of_the_samples_that_is_no_file(stores, tmp_path, name, what):
    for other, content in stores[1].items():
        (tmp_path / other).write_bytes(content)
    os.remove(tmp_path / name)
    if what == "folder":
        (tmp_path / name).mkdir()
    elif what == "loop":
        os.symlink(tmp_path / name, tmp_path / name)
    refused = []
    assert read_or_refuse(lambda: refused.append(read_store(tmp_path, {}))) is None and not refused


@pytest.mark.parametrize("what", ["folder", "loop"])
@pytest.mark.parametrize("name", ["settings.json", "part-0"])
def test_a_part_of_unfinished_samples_that_is_no_file(tmp_path, name, what):
    parts = tmp_path / "test.parts"
    parts.mkdir()
    for other, content in PARTS.items():
        (parts / other).write_bytes(content)
    os.remove(parts / name)
    if what == "folder":
        (parts / name).mkdir()
    else:
        os.symlink(parts / name, parts / name)

    def resume():
        with StoreWriter(str(tmp_path / "test"), STORED, checkpoint="base.pt", dictionary_size=24) as writer:
            for first in writer.missing():
                writer.add(first, torch.from_numpy(TOKENS[list(writer.chunk(first))]).flatten(0, 1))
            writer.finish()
        return True

    if read_or_refuse(resume):
        read_store(tmp_path, {})


@pytest.mark.parametrize("what", ["folder", "a/b", "loop/x", "empty/x", "x" * 300])
def test_where_no_results_can_be_written(tmp_path, what):
    strange_files(tmp_path)
    path = str(tmp_path / what)

    def write():
        check_json(path)
        write_json(path, {})
        return True

    assert read_or_refuse(write) is None


def test_a_file_that_claims_the_world_takes_no_memory(tmp_path):
    """A header of some bytes; limits are a hundred megabytes."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1))
    bomb = gzip.compress(struct.pack(">4I", 0x803, 2**31, 1, 1) + bytes(1 << 24))
    other = tmp_path / "other"
    other.mkdir()
    (other / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}" % 2**60
    archive = tmp_path / "big.npz"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    for path in (tmp_path, other, archive):
        with limits(megabytes=100):
            assert read_or_refuse(read_image_files, str(path)) is None
    lines = "".join(f"{tag}-{10**17}\tx\n" if tag != "D" else f"D-{10**17}\t1\tx\n" for tag in "STHD")
    (tmp_path / "generated").write_text(lines)
    with limits(megabytes=100):
        assert read_or_refuse(read_generated, str(tmp_path / "generated")) is None
    many = "".join(f"T-{n}\tx\nD-{n}\t1\tx\nP-{n}\t1\n" for n in range(3000)) + "D-0\t1\tx\nP-0\t1\n" * 3000
    (tmp_path / "list").write_text(GENERATED.splitlines()[0] + "\n" + many)
    with limits(megabytes=100):
        assert read_or_refuse(read_nbest, [str(tmp_path / "list")]) is None


@pytest.mark.parametrize("record", [{"sequences": 2**60}, {"samples": 2**60}, {"batch_size": 2**62, "sequences": 2**62}])
def test_samples_that_claim_the_world_take_no_memory(stores, tmp_path, record):
    for name, content in stores[1].items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "test.json").write_text(json.dumps({**json.loads(stores[1]["test.json"]), **record}))
    with limits(megabytes=100):
        refused = []
        assert read_or_refuse(lambda: refused.append(read_store(tmp_path, {}))) is None and not refused


@pytest.mark.parametrize("line", ["a" * 60000, '{"a' * 20000, "valid on '" * 6000, "epoch 1: " * 7000, " " * 60000, "x" * 10**6, "epoch 1 | loss " * 4000])
def test_a_long_line_of_a_log_takes_no_time(tmp_path, line):
    (tmp_path / "log").write_text(line + "\n" + LOG)
    with limits(seconds=10):
        assert len(read_log(tmp_path / "log")["train"]) == 2
        run_folder._facts([tmp_path / "log"])
