"""Every format that fairseq logs in gives the same history, over restarts too."""
import builtins
import json
import os

import pytest

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation import training_log
from fairseq_earm.evaluation.training_log import (
    cross_entropy_key, earm_start, find_logs, is_training_log, read_log, read_run, read_tensorboard, series, validated_kinds,
)
from tests.damage import limits

STAMP = "2025-01-01 10:00:00 | INFO | "


def inner(update, loss, **more):
    return STAMP + f"train_inner | {json.dumps({'epoch': 1, 'loss': str(loss), 'num_updates': str(update), **more})}\n"


def write(path, *lines):
    path.write_text("".join(lines))
    return path


def test_json_by_kind_without_prefixes(tmp_path):
    log = write(
        tmp_path / "train.log", STAMP + "fairseq_cli.train | training on 1 devices {not a record}\n",
        STAMP + "fairseq_cli.train | {'_name': None, 'num_updates': 3}\n", '{"text": "no record"}\n', '{"loss": broken}\n',
        inner(50, 3.5, note="x"), inner(100, 3.0, earm_dv=None),
        STAMP + 'train | {"epoch": 1, "train_loss": "3.2", "train_train_wall": "9", "train_num_updates": "100"}\n',
        STAMP + 'valid | {"epoch": 1, "valid_nll_loss": "2.5", "valid_loss": "nan", "valid_num_updates": "100"}\n',
    )
    history = read_log(log)
    assert list(history) == ["train_inner", "train", "valid"]
    assert series(history["train_inner"], "loss") == ([50, 100], [3.5, 3.0])
    assert series(history["train_inner"], "absent") == ([], [])
    assert history["train"] == [{"epoch": 1, "loss": 3.2, "train_wall": 9, "num_updates": 100}]
    assert history["valid"][0]["nll_loss"] == 2.5
    assert cross_entropy_key(history) == "nll_loss" and validated_kinds(history) == ["valid"]


def test_json_of_plain_handlers_and_of_validation_alone(tmp_path):
    log = write(
        tmp_path / "plain.log", 'INFO:valid_extra:{"epoch": 1, "valid_extra_loss": "2.5", "valid_extra_num_updates": "3"}\n',
        'INFO:test:{"test_loss": "1.5", "test_bits_per_dim": "1.5"}\n', 'INFO:test:{"test_bits_per_dim": "1.25"}\n',
    )
    assert read_log(log) == {
        "valid_extra": [{"epoch": 1.0, "loss": 2.5, "num_updates": 3.0}], "test": [{"loss": 1.5, "bits_per_dim": 1.5}, {"bits_per_dim": 1.25}],
    }
    assert not is_training_log(log)


def test_plain_text(tmp_path):
    log = write(
        tmp_path / "train.log", "epoch 002:    50 / 200 loss=3.5, ppl=11.3, num_updates=250, gnorm=nan, clip=0\n",
        STAMP + "train | epoch 002 | loss 3.25 | ppl 9.5 | num_updates 400 | train_wall 7\n",
        STAMP + "valid | epoch 002 | valid on 'valid' subset | loss 2.5 | num_updates 400 | best_loss 2.5\n",
        "INFO:test:valid on 'test' subset | loss 8.2 | nll_loss 8.0\n", "a line | loss 3 | x\n", "begin training epoch 2\n",
    )
    history = read_log(log)
    assert history["train_inner"][0].pop("gnorm") != 0
    assert history == {
        "train_inner": [{"epoch": 2, "update": 1.25, "loss": 3.5, "ppl": 11.3, "num_updates": 250, "clip": 0}],
        "train": [{"epoch": 2, "loss": 3.25, "ppl": 9.5, "num_updates": 400, "train_wall": 7}],
        "valid": [{"epoch": 2, "loss": 2.5, "num_updates": 400, "best_loss": 2.5}],
        "test": [{"loss": 8.2, "nll_loss": 8.0}],
    }


def test_a_run_that_was_resumed_has_one_history(tmp_path):
    valid = STAMP + 'valid | {"epoch": 1, "valid_loss": "%s", "valid_num_updates": "%s"}\n'
    log = write(
        tmp_path / "train.log", inner(20, 5.0), inner(20, 5.0), inner(40, 4.0), valid % (9, 50), inner(60, 3.9), valid % (8, 70),
        inner(40, 4.1), inner(60, 3.8), valid % (7, 65),
    )
    history = read_log(log)
    assert series(history["train_inner"], "loss") == ([20, 40, 60], [5.0, 4.1, 3.8])
    assert series(history["valid"], "loss") == ([65], [7.0])


def test_several_logs_of_one_run(tmp_path):
    first = write(tmp_path / "first.log", inner(20, 5.0), inner(40, 4.0), inner(60, 3.9))
    later = write(tmp_path / "later.log", inner(40, 4.1), inner(60, 3.8), inner(80, 3.0))
    assert series(read_run([first, later])["train_inner"], "loss") == ([20, 40, 60, 80], [5.0, 4.1, 3.8, 3.0])
    assert series(read_run([later, first])["train_inner"], "loss") == ([20, 40, 60, 80], [5.0, 4.0, 3.9, 3.0])


def figures(history, kinds=("train_inner", "train", "valid", "test"), digits=3):
    """What all formats log, as far as it does not depend on the machine's speed."""
    keys = ("num_updates", "epoch", "loss", "nll_loss", "earm_loss", "earm_dv", "gnorm")
    return {kind: [[round(r[key], digits) for key in keys if key in r] for r in history[kind]] for kind in kinds}


def test_real_logs_agree_whatever_their_format(logged):
    expected = read_log(logged.json)
    assert set(expected) == {"train_inner", "train", "valid", "test"}
    assert [len(expected[kind]) for kind in ("train", "valid", "test")] == [3, 3, 3]
    assert [record["num_updates"] for record in expected["train_inner"]] == list(range(4, len(expected["train_inner"]) * 4 + 1, 4))
    start = earm_start(expected)
    assert start["epoch"] == 2 and "earm_dv" in start and all("earm_loss" not in record for record in expected["valid"])
    for log in (logged.simple, logged.log_file):
        assert figures(read_log(log)) == figures(expected)
        assert [r["update"] for r in read_log(log)["train_inner"]] == pytest.approx([r["update"] for r in expected["train_inner"]])


def test_real_tensorboard_files_agree_with_the_log(logged):
    pytest.importorskip("tensorboard")
    found, expected = read_tensorboard(logged.events), read_log(logged.json)
    assert set(found) == set(expected)
    for kind, records in expected.items():
        assert [r["num_updates"] for r in found[kind]] == [r["num_updates"] for r in records]
        assert [r["epoch"] for r in found[kind]] == [r["epoch"] for r in records]
        for key in ("loss", "nll_loss", "earm_dv"):
            assert series(found[kind], key)[1] == pytest.approx(series(records, key)[1], abs=1e-3)


def test_tensorboard_after_a_restart(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for begin, losses in ((0, [5.0, 4.0, 3.0]), (1, [4.5, 3.5])):
        with SummaryWriter(str(tmp_path / "train_inner"), filename_suffix=f".{begin}") as writer:
            for step, loss in enumerate(losses, begin):
                writer.add_scalar("loss", loss, 10 * step)
                writer.add_scalar("gnorm", 1.0, 10 * step)
    assert read_run([tmp_path])["train_inner"] == [
        {"num_updates": 10.0 * step, "loss": loss, "gnorm": 1.0} for step, loss in enumerate([5.0, 4.5, 3.5])
    ]


def test_tensorboard_is_asked_for_where_it_is_missing(logged, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="tensorboard, which is not installed"):
        read_run([logged.events])


def test_logs_are_found_where_they_usually_go(tmp_path, logged):
    run = tmp_path / "run"
    run.mkdir()
    assert find_logs(run) == []
    (run / "events" / "train_inner").mkdir(parents=True)
    (run / "events" / "train_inner" / "events.out.tfevents.1.host").touch()
    assert find_logs(run) == [run / "events"] and find_logs(run / "events") == [run / "events"]
    write(run / "generate.log", "S-0\ta\n")
    later, first = write(tmp_path / "run.log", inner(2, 1.0)), write(run / "train.log", inner(1, 1.0))
    os.utime(first, (1, 1))
    assert find_logs(run) == [first, later]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="no records of training"):
        read_run([write(tmp_path / "empty.log", "nothing\n")])
    with pytest.raises(UsageError, match="cannot be read"):
        read_run([tmp_path / "absent.log"])
    with pytest.raises(UsageError, match="no such folder"):
        find_logs(tmp_path / "absent")


def test_many_kinds_at_one_update_take_no_time(tmp_path):
    """Each with a record of its own; and again, as where fairseq opens its file anew."""
    lines = [f'INFO:k{n}:{{"k{n}_loss": "{n}", "k{n}_num_updates": "5"}}\n' for n in range(15000)]
    with limits(seconds=10):
        history = read_log(write(tmp_path / "log", *lines, *lines))
    assert len(history) == 15000 and all(len(records) == 1 for records in history.values())


def test_many_restarts_take_no_time(tmp_path):
    lines = [inner(n % 2 + 1, n) for n in range(10000)]
    kinds = [STAMP + f'k{n} | {{"k{n}_loss": "1", "k{n}_num_updates": "0"}}\n' for n in range(5000)]
    with limits(seconds=10):
        history = read_log(write(tmp_path / "log", *kinds, *lines))
    assert series(history["train_inner"], "loss") == ([1, 2], [9998, 9999])


@pytest.mark.parametrize("place", ["nan", "inf", "-1", "1e308"])
def test_no_record_stands_at_a_place_that_is_none(tmp_path, place):
    log = write(
        tmp_path / "train.log", inner(20, 5.0), f"epoch 001:  3 / 9 loss=4.0, num_updates={place}\n",
        inner(40, 3.0), inner(30, 2.0),
        STAMP + f"valid | epoch 001 | valid on 'valid' subset | loss 2.5 | num_updates {place}\n",
    )
    history = read_log(log)
    assert [record.get("num_updates") for record in history["train_inner"]] == [20, None, 30]
    assert history["valid"] == [{"epoch": 1, "loss": 2.5}]


def test_one_record_tells_a_log_of_training(tmp_path):
    """The rest of it, which may be long, is not read for that."""
    lines = iter([("valid", {}), ("train_inner", {}), None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_log, "_records", lambda path: lines)
        assert is_training_log(tmp_path)
    assert next(lines) is None


def test_keys_of_a_long_log_are_kept_once(tmp_path):
    first, second = read_log(write(tmp_path / "log", inner(1, 5.0), inner(2, 5.0)))["train_inner"]
    assert all(here is there for here, there in zip(first, second))
