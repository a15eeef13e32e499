"""Models `pixel_cnn` and `gated_pixel_cnn`, shaped like language models whose tokens are the values of an image."""
from dataclasses import dataclass, field

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import FairseqDecoder, FairseqLanguageModel, register_model, register_model_architecture

from fairseq_earm.errors import UsageError
from fairseq_earm.models.pixel_networks import GatedPixelCnn, PixelNetwork, PlainPixelCnn, Stepwise

SIZES = ("features", "layers", "hidden_features", "first_kernel", "kernel")


class PixelDecoder(FairseqDecoder):
    """A network over images, read and written as sequences of values: by rows, within them by pixels, then by colours.

    Args:
        dictionary: as many symbols as a value has levels.
        network: from images to logits.
        image_shape: (height, width, colours).
    """

    def __init__(self, dictionary, network: PixelNetwork, image_shape):
        super().__init__(dictionary)
        self.network = network
        self.image_shape = tuple(image_shape)
        self.levels = len(dictionary)

    def forward(self, src_tokens, encoder_out=None, **kwargs):
        """Logits of every value given those before it.

        Args:
            src_tokens: (B, H · W · C) values from 0 to levels − 1. Unlike a language model's they are not shifted.
        Returns:
            (B, H · W · C, levels) logits, those at position k made from the values before k; and an empty dictionary.
        """
        height, width, colours = self.image_shape
        images = self._scale(src_tokens).view(-1, height, width, colours).permute(0, 3, 1, 2)
        logits = self.network(images).view(-1, colours, self.levels, height, width)
        return logits.permute(0, 3, 4, 1, 2).reshape(len(src_tokens), -1, self.levels), {}

    def stepwise(self, batch: int) -> "PixelSteps":
        """The same logits one position after the other, for `batch` images that come to be."""
        height, width, _ = self.image_shape
        return PixelSteps(Stepwise(self.network, batch, height, width), self._scale)

    def max_positions(self) -> int:
        height, width, colours = self.image_shape
        return height * width * colours

    def _scale(self, values):
        return values.to(self.network.first.weight.dtype) * (2 / (self.levels - 1)) - 1


class PixelSteps:
    """`Stepwise` in values from 0 to levels − 1."""

    def __init__(self, steps: Stepwise, scale):
        self.steps, self.scale = steps, scale

    def logits(self) -> torch.Tensor:
        """(B, levels) of the next value."""
        return self.steps.logits()

    def append(self, values: torch.Tensor) -> None:
        """The next value of each image, (B,)."""
        self.steps.append(self.scale(values))


@dataclass
class PixelCnnConfig(FairseqDataclass):
    """Sizes of `pixel_cnn`; the defaults are those of the paper's CIFAR-10 model as far as it gives them."""

    features: int = field(default=256, metadata={"help": "features of the residual stream, twice those of its blocks"})
    layers: int = field(default=15, metadata={"help": "residual blocks"})
    hidden_features: int = field(default=1024, metadata={"help": "features before the logits"})
    first_kernel: int = field(default=7, metadata={"help": "width of the first kernel, odd"})
    kernel: int = field(default=3, metadata={"help": "width of the other kernels, odd"})


@dataclass
class GatedPixelCnnConfig(PixelCnnConfig):
    """Sizes of `gated_pixel_cnn`."""

    features: int = field(default=128, metadata={"help": "features of each of the two stacks"})
    layers: int = field(default=15, metadata={"help": "layers, the first one included"})
    hidden_features: int = field(default=1024, metadata={"help": "features before the logits"})


class PixelModel(FairseqLanguageModel):
    """An autoregressive model of images of one shape, which the task knows."""

    network: type

    @classmethod
    def build_model(cls, args, task):
        """A model of images of the task's `image_shape` and `target_dictionary`.

        Raises:
            UsageError: another kind of task, or a size that cannot be.
        """
        _check(args, task)
        _, _, colours = task.image_shape
        network = cls.network(
            colours, len(task.target_dictionary), features=args.features, layers=args.layers, hidden=args.hidden_features,
            first_size=args.first_kernel, size=args.kernel,
        )
        return cls(PixelDecoder(task.target_dictionary, network, task.image_shape))


def _check(cfg, task) -> None:
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", "pixel_cnn")
    if getattr(task, "image_shape", None) is None:
        raise UsageError(f"--arch {name} is a model of images: give --task earm_image_modeling")
    for size in SIZES:
        value, flag = getattr(cfg, size), f"--{size.replace('_', '-')}"
        if value < 1:
            raise UsageError(f"{flag} {value}: give at least 1")
        if "kernel" in size and value % 2 == 0:
            raise UsageError(f"{flag} {value}: a kernel has a pixel in its middle; give an odd number")
    least = 2 * task.image_shape[2]
    if cfg.features < least or cfg.hidden_features < least:
        raise UsageError(
            f"--features {cfg.features}, --hidden-features {cfg.hidden_features}: they are divided among the "
            f"{task.image_shape[2]} colours; give at least {least}"
        )


@register_model("pixel_cnn", dataclass=PixelCnnConfig)
class PixelCnnModel(PixelModel):
    """PixelCNN, with its blind spot to the upper right."""

    network = PlainPixelCnn


@register_model("gated_pixel_cnn", dataclass=GatedPixelCnnConfig)
class GatedPixelCnnModel(PixelModel):
    """Gated PixelCNN, which has none."""

    network = GatedPixelCnn


def _architecture(**sizes):
    def architecture(args):
        for name, value in sizes.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)

    return architecture


for _model, _name, _sizes in (
    ("pixel_cnn", "pixel_cnn_tiny", {"features": 32, "layers": 3, "hidden_features": 32}),
    ("gated_pixel_cnn", "gated_pixel_cnn_tiny", {"features": 16, "layers": 4, "hidden_features": 32}),
    # The paper's on ImageNet.
    ("gated_pixel_cnn", "gated_pixel_cnn_imagenet", {"features": 384, "layers": 20, "kernel": 5}),
):
    register_model_architecture(_model, _name)(_architecture(**_sizes))
