"""Starting an energy network from a model that was trained on something else (`--energy-init`)."""
from __future__ import annotations

import logging
import os
import re
from typing import Dict, NamedTuple, Tuple, Type

from fairseq import checkpoint_utils
from fairseq.models import ARCH_MODEL_REGISTRY, BaseFairseqModel
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_earm.errors import UsageError, reason

logger = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """A kind of model that an energy network may start from."""

    kind: str
    model: Type[BaseFairseqModel]
    prefix: str  # of the parameters of the trunk
    unused: Tuple[str, ...]  # parameters below the prefix that an energy network has no use for
    extra_symbols: int  # that its vocabulary may have at the end
    flags: Tuple[str, ...]  # must be the same here and there; most of them show in no shape


LANGUAGE_MODEL = Pretrained(
    kind="transformer_lm",
    model=TransformerLanguageModel,
    prefix="decoder.",
    unused=("output_projection.", "project_out_dim.", "adaptive_softmax.", "embed_out"),
    extra_symbols=0,
    flags=(
        "decoder_layers",
        "decoder_embed_dim",
        "decoder_ffn_embed_dim",
        "decoder_attention_heads",
        "decoder_normalize_before",
        "no_decoder_final_norm",
        "decoder_learned_pos",
        "no_token_positional_embeddings",
        "layernorm_embedding",
        "no_scale_embedding",
        "activation_fn",
    ),
)
# <mask> is added to the dictionary by the task masked_lm.
MASKED_LANGUAGE_MODEL = Pretrained(
    kind="roberta",
    model=RobertaModel,
    prefix="encoder.sentence_encoder.",
    unused=(),
    extra_symbols=1,
    flags=(
        "encoder_layers",
        "encoder_embed_dim",
        "encoder_ffn_embed_dim",
        "encoder_attention_heads",
        "encoder_normalize_before",
        "activation_fn",
    ),
)
EMBEDDINGS, POSITIONS = "embed_tokens.weight", "embed_positions.weight"
# Buffers, and the copy of encoder weights that stock fairseq keeps for inference and brings up to date in loading.
UNTRAINED = re.compile(r"\.(version|_float_tensor)$|\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


def start_from_checkpoint(model: BaseFairseqModel, cfg, pretrained: Pretrained) -> None:
    """Give the model's trunk the parameters of the checkpoint `--energy-init`; nothing without one.

    The flag is then taken out of the configuration, so that a finished energy model, whose parameters come from its own
    checkpoint, does not ask for the file again.

    Args:
        model: an energy network with a `trunk`.
        cfg: its configuration.
        pretrained: what it may start from.
    Raises:
        UsageError: no such file, a checkpoint of another kind, or of another size.
    """
    path = cfg.energy_init
    if path is None:
        return
    state = _load(path)
    trunk = _trunk_parameters(path, state, pretrained)
    _check_flags(path, cfg, state["cfg"].model, pretrained)
    _check_sizes(path, cfg, model, trunk, pretrained)
    trunk[EMBEDDINGS] = trunk[EMBEDDINGS][: model.vocabulary_size]
    _copy(path, model, trunk)
    _forget(cfg)
    logger.info(f"the energy network starts from {path}, a {pretrained.kind}")


def _load(path: str) -> dict:
    if not os.path.isfile(path):
        remedy = "give a checkpoint of fairseq-train, or leave it out to go on from a checkpoint of your own"
        raise UsageError(f"--energy-init {path}: there is no such file; {remedy}")
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        return {"model": state["model"], "cfg": state["cfg"]}
    except Exception as error:  # fairseq raises whatever it likes at files that are no checkpoints
        raise UsageError(f"--energy-init {path}: no checkpoint of fairseq-train ({reason(error)})") from error


def _trunk_parameters(path: str, state: dict, pretrained: Pretrained) -> Dict[str, Tensor]:
    """The checkpoint's parameters that belong to the trunk, under the trunk's names."""
    found = getattr(state["cfg"].model, "_name", None) or "an unknown model"
    start = len(pretrained.prefix)
    parameters = {_today(name): value for name, value in state["model"].items()}
    inside = {name[start:]: value for name, value in parameters.items() if name.startswith(pretrained.prefix)}
    if not issubclass(ARCH_MODEL_REGISTRY.get(found, object), pretrained.model):
        raise UsageError(f"--energy-init {path}: a {found}, and this network starts from a {pretrained.kind}")
    if EMBEDDINGS not in inside:
        raise UsageError(f"--energy-init {path}: a {found} without plain word embeddings, which this network needs")
    return {name: value for name, value in inside.items() if not name.startswith(pretrained.unused)}


def _today(name: str) -> str:
    """Names that RoBERTa's parameters had in earlier versions of fairseq, among them its published checkpoints."""
    return name.replace("decoder.sentence_encoder.", "encoder.sentence_encoder.").replace(
        ".emb_layer_norm.", ".layernorm_embedding."
    )


def _check_flags(path: str, cfg, theirs, pretrained: Pretrained) -> None:
    for name in pretrained.flags:
        value = getattr(theirs, name, None)  # checkpoints of old versions do not know every flag
        if value is not None and str(value) != str(getattr(cfg, name)):
            _differ(path, f"--{name.replace('_', '-')}", getattr(cfg, name), value)


def _check_sizes(path: str, cfg, model, trunk: Dict[str, Tensor], pretrained: Pretrained) -> None:
    """The sizes that depend on data more than on flags."""
    symbols = len(trunk[EMBEDDINGS])
    if not 0 <= symbols - model.vocabulary_size <= pretrained.extra_symbols:
        raise UsageError(
            f"--energy-init {path}: its vocabulary has {symbols} symbols and the data's {model.vocabulary_size}; "
            "binarise the data with its dictionary (fairseq-preprocess --srcdict)"
        )
    here, there = model.trunk.embed_tokens.embedding_dim, trunk[EMBEDDINGS].size(1)
    if here != there:
        _differ(path, "--decoder-input-dim", here, there)
    here, there = model.trunk.layernorm_embedding is not None, "layernorm_embedding.weight" in trunk
    if here != there:
        _differ(path, "--layernorm-embedding", here, there)
    if POSITIONS in trunk:
        there = len(trunk[POSITIONS]) - model.pad - 1
        if there != cfg.max_positions:
            _differ(path, "--max-positions", cfg.max_positions, there)


def _differ(path: str, flag: str, here, there) -> None:
    raise UsageError(
        f"--energy-init {path}: {flag} is {here} here and {there} in the checkpoint; give the network the checkpoint's "
        "flags (--arch energy_transformer_unit and energy_transformer_bit fix none of them)"
    )


def _copy(path: str, model: BaseFairseqModel, trunk: Dict[str, Tensor]) -> None:
    state = {f"trunk.{name}": value for name, value in trunk.items()}
    model.upgrade_state_dict(state)
    here, there = _shapes(model.trunk.named_parameters(prefix="trunk")), _shapes(state.items())
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            _differ(path, name, here.get(name, "missing"), there.get(name, "missing"))
    model.load_state_dict(state, strict=False)


def _shapes(parameters) -> Dict[str, Tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in parameters if not UNTRAINED.search(name)}


def _forget(cfg) -> None:
    """Take the flag out of the configuration that the trainer writes into checkpoints."""
    if not OmegaConf.is_config(cfg):
        return
    cfg.energy_init = None
    whole = cfg._get_parent()
    if whole is not None:
        whole.model.energy_init = None
