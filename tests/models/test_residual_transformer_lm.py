"""RALM: its distribution, what of it learns, and stock commands around it."""
import math
import re

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.errors import UsageError
from tests.models.commands import RESIDUAL_LANGUAGE_MODEL, TASK, train, write_text
from tests.models.networks import sequences
from tests.tiny_translation import command, recorded_log, tagged


def load(path, **overrides):
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)
    return models[0].double().eval()


def read(model, tokens):
    """What a language model reads: end-of-sentence, then all tokens."""
    return torch.cat([torch.full((len(tokens), 1), model.decoder.dictionary.eos()), tokens], 1)


def log_probs(model, inputs):
    """fairseq's log-softmax ends in float32 whatever it began with."""
    return model.get_normalized_probs(model(inputs), log_probs=True).double()


def test_next_token_distribution(text):
    ralm, base = load(text.ralm), load(text.lm)
    inputs = read(ralm, sequences(6, 6))
    unnormalised = log_probs(base, inputs).exp() * ralm.decoder.residual(inputs)[0].exp()
    by_hand = unnormalised / unnormalised.sum(-1, keepdim=True)
    torch.testing.assert_close(log_probs(ralm, inputs).exp(), by_hand, rtol=1e-5, atol=1e-7)
    assert (log_probs(ralm, inputs) - log_probs(base, inputs)).abs().max() > 0.01


def test_without_a_residual_it_is_its_base(text):
    ralm = load(text.ralm)
    torch.nn.init.zeros_(ralm.decoder.residual.output_projection.weight)
    inputs = read(ralm, sequences(6, 6))
    torch.testing.assert_close(log_probs(ralm, inputs), log_probs(load(text.lm), inputs), rtol=1e-5, atol=1e-6)


def test_only_the_residual_part_learns(text):
    ralm = load(text.ralm).train()
    log_probs(ralm, read(ralm, sequences(6, 6)))[..., 5].sum().backward()
    base = ralm.decoder.base.model
    assert not base.training and all(value.grad is None and not value.requires_grad for value in base.parameters())
    assert all(value.grad is not None for value in ralm.parameters())
    assert not {id(value) for value in base.parameters()} & {id(value) for value in ralm.parameters()}


def test_the_checkpoint_holds_the_residual_part_alone(text):
    base, ralm = (torch.load(path, weights_only=False) for path in (text.lm, text.ralm))
    assert sorted(ralm["model"]) == sorted(key.replace("decoder.", "decoder.residual.", 1) for key in base["model"])
    moments = [sum(state["exp_avg"].numel() for state in run["last_optimizer_state"]["state"].values()) for run in (base, ralm)]
    assert moments[0] == moments[1]


def test_step_by_step_as_in_one_pass(text):
    ralm, cache = load(text.ralm), {}
    inputs = read(ralm, sequences(6, 6, 6))
    whole = ralm(inputs)[0]
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        for end in range(1, 8):
            step = ralm.decoder(inputs[:, :end], incremental_state=cache)[0]
            torch.testing.assert_close(step[:, 0], whole[:, end - 1], rtol=1e-6, atol=1e-6)  # the base's end in float32
            if end == 3:  # as beam search does
                ralm.decoder.reorder_incremental_state_scripting(cache, order)
                inputs, whole = torch.cat([inputs[order, :3], inputs[:, 3:]], 1), None
                whole = ralm(inputs)[0]


def test_the_base_follows_its_model(text):
    ralm = load(text.ralm).bfloat16()  # float16 needs a GPU in older torch
    base = ralm.decoder.base.model
    assert {value.dtype for value in base.parameters()} == {torch.bfloat16}
    inputs = read(ralm, sequences(6, 6))
    assert ralm(inputs)[0].dtype == torch.float32
    exact = log_probs(load(text.ralm), inputs)
    torch.testing.assert_close(log_probs(ralm, inputs), exact, atol=0.02, rtol=0.02)
    ralm.to("meta")
    assert {value.device.type for value in base.parameters()} == {"meta"}


def test_positions_are_the_fewer_of_the_two(text):
    ralm = load(text.ralm)
    assert ralm.max_positions() == 12
    ralm.decoder.base.model.decoder.max_target_positions = 7
    assert ralm.max_positions() == 7


def loss(text, path):
    with recorded_log() as records:
        keep = ["--cpu", "--batch-size", 16, "--required-batch-size-multiple", 1, "--no-progress-bar"]
        command("eval_lm", text.data, *TASK, "--path", path, *keep)
    found = [re.search(r"Loss \(base 2\): ([\d.]+)", record.getMessage()) for record in records]
    return float(next(match for match in found if match).group(1))


def test_stock_evaluation(text):
    """Bits per token of the test set, by the distribution of Eq. 6 worked out by hand, block by block."""
    ralm, base = load(text.ralm), load(text.lm)
    _, _, task = checkpoint_utils.load_model_ensemble_and_task([str(text.ralm)])
    task.load_dataset("test")
    bits, tokens = 0.0, 0
    for item in task.dataset("test"):
        inputs, target = item["source"].unsqueeze(0), item["target"]
        mixed = (log_probs(base, inputs) + ralm.decoder.residual(inputs)[0]).log_softmax(-1)
        bits -= mixed[0, torch.arange(len(target)), target].sum().item() / math.log(2)
        tokens += len(target)
    assert loss(text, text.ralm) == pytest.approx(bits / tokens, abs=1e-3)


def test_stock_generation(text):
    where = [text.data, *TASK, "--sample-break-mode", "eos", "--path", text.ralm, "--gen-subset", "test"]
    how = ["--beam", 3, "--max-len-b", 8, "--prefix-size", 3, "--batch-size", 4]
    printed = command("generate", *where, *how, "--cpu", "--num-workers", 0, "--no-progress-bar")
    hypotheses = tagged(printed, "P")
    assert len(hypotheses) >= 8
    ralm, dictionary = load(text.ralm), load(text.ralm).decoder.dictionary
    for number, lines in tagged(printed, "H").items():
        words = dictionary.encode_line(lines[0].split("\t")[1], add_if_not_exist=False, append_eos=True).long().unsqueeze(0)
        scores = log_probs(ralm, read(ralm, words)[:, :-1])[0].gather(-1, words[0].unsqueeze(-1)).squeeze(-1) / math.log(2)
        reported = torch.tensor([float(score) for score in hypotheses[number][0].split()])
        torch.testing.assert_close(reported, scores.float(), rtol=0, atol=2e-3)


def test_training_lowers_the_loss_of_its_base(text, tmp_path):
    longer = train(text.data, tmp_path, *RESIDUAL_LANGUAGE_MODEL, "--base-lm", text.lm, "--max-update", 40)
    assert loss(text, longer) < loss(text, text.lm) - 0.05


def refused(*arguments):
    with pytest.raises(UsageError) as error:
        train(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_bad_bases(text, tiny, tmp_path):
    start = [text.data, tmp_path / "out", *RESIDUAL_LANGUAGE_MODEL]
    assert "residual_transformer_lm needs --base-lm" in refused(*start)
    assert "--base-lm" in refused(*start, "--base-lm", tmp_path / "none.pt")
    assert "--base-lm" in refused(*start, "--base-lm", tiny.a)
    assert "RobertaModel, which is no language model" in refused_with_own_dictionary(text, tmp_path)
    assert "--adaptive-softmax-cutoff" in refused(*start, "--base-lm", text.lm, "--adaptive-softmax-cutoff", "6,8")
    assert not list((tmp_path / "out").glob("*.pt"))


def refused_with_own_dictionary(text, tmp_path):
    """A masked language model whose dictionary is the data's, <mask> included."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for file in text.data.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with open(folder / "dict.txt", "a") as dictionary:
        dictionary.write("<mask> 1\n")
    return refused(folder, tmp_path / "out", *RESIDUAL_LANGUAGE_MODEL, "--base-lm", text.mlm)


def test_another_dictionary(text, tmp_path):
    write_text(tmp_path, {"train": 20, "valid": 20}, seed=3)
    (tmp_path / "train.txt").write_text((tmp_path / "train.txt").read_text().replace("a", "z"))
    splits = [f"--{split}pref={tmp_path / split}.txt" for split in ("train", "valid")]
    command("preprocess", "--only-source", *splits, "--destdir", tmp_path / "data", "--workers", 1)
    message = refused(tmp_path / "data", tmp_path / "out", *RESIDUAL_LANGUAGE_MODEL, "--base-lm", text.lm)
    assert "--base-lm" in message and "dictionary is not the data's" in message


def test_a_base_that_moved(text, tmp_path):
    moved = tmp_path / "moved.pt"
    moved.write_bytes(text.lm.read_bytes())
    inputs = sequences(4)
    torch.testing.assert_close(load(text.ralm, base_lm=str(moved))(inputs)[0], load(text.ralm)(inputs)[0])
