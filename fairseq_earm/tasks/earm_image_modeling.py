"""Task `earm_image_modeling`: autoregressive models of images, in bits per dimension."""
import math
import os
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, OmegaConf

from fairseq_earm.errors import UsageError
from fairseq_earm.models.pixel_cnn import PixelModel
from fairseq_earm.sampling.images import ImageFamily
from fairseq_earm.tasks.batching import ExactBatches
from fairseq_earm.tasks.image_data import ImageDataset, Levels, Preparation, format_shape, load_images, parse_shape
from fairseq_earm.tasks.image_files import KNOWN


@dataclass
class EarmImageModelingConfig(FairseqDataclass):
    """What `--task earm_image_modeling` takes."""

    data: Optional[str] = field(default=None, metadata={"help": f"folder with {KNOWN}"})
    image_levels: int = field(default=256, metadata={"help": "levels of a value; fewer than 256 make coarser images"})
    image_downsample: int = field(default=1, metadata={"help": "average N x N pixels to one"})
    train_images: int = field(default=0, metadata={"help": "train on the first N images only; 0: all"})
    valid_images: Optional[int] = field(
        default=None,
        metadata={"help": "where the files have no valid split: the last N training images are it (default: a tenth of them)"},
    )
    test_images: Optional[int] = field(default=None, metadata={"help": "the same for test, which is taken before valid"})
    image_shape: Optional[str] = field(
        default=None,
        metadata={"help": "HEIGHTxWIDTHxCOLOURS; the data says it, and checkpoints keep it for where there is no data"},
    )
    train_subset: str = II("dataset.train_subset")
    # What `transformer_lm` asks of its task, see `residual_language_modeling`: `build_model` says that it is no model of images.
    add_bos_token: bool = II("common.tpu")
    tokens_per_sample: int = II("task.image_levels")
    max_target_positions: Optional[int] = II("task.image_levels")


@register_task("earm_image_modeling", dataclass=EarmImageModelingConfig)
class EarmImageModelingTask(ExactBatches, FairseqTask):
    """Images of one shape; each of their values is a token with so many levels.

    Attributes:
        image_shape: (height, width, colours).
        images: uint8 (N, H, W, C) by split; None where a checkpoint is used without its data.
    """

    def __init__(self, cfg, image_shape, images=None):
        super().__init__(cfg)
        self.image_shape = image_shape
        self.images = images
        self.levels = Levels(cfg.image_levels)

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        """Read the images.

        Raises:
            UsageError: files or flags that will not do.
        """
        said = parse_shape(cfg.image_shape) if cfg.image_shape else None
        if said and not (cfg.data and os.path.exists(cfg.data)):
            return cls(cfg, said)
        if not cfg.data:
            raise UsageError(f"no data: give a folder with {KNOWN} as the first argument")
        images = load_images(cfg.data, Preparation(*(getattr(cfg, name) for name in Preparation._fields)))
        shape = images["train"].shape[1:]
        if said and said != shape:
            raise UsageError(
                f"--image-shape {cfg.image_shape} (a checkpoint brings its own): {cfg.data} has images of {format_shape(shape)}; give "
                "images of that shape, or leave the flag out"
            )
        _remember(cfg, format_shape(shape))
        return cls(cfg, shape, images)

    @property
    def source_dictionary(self):
        return self.levels

    @property
    def target_dictionary(self):
        return self.levels

    def load_dataset(self, split, combine=False, **kwargs):
        """Load a split as an `ImageDataset`."""
        if self.images is None:
            raise UsageError(f"{self.cfg.data}: there is no such folder; give one with {KNOWN}")
        if split not in self.images:
            raise UsageError(f"split {split}: images have the splits {', '.join(self.images)}; give one of them")
        self.datasets[split] = ImageDataset(self.images[split], shuffle=split == self.cfg.train_subset)

    def get_batch_iterator(self, dataset, max_tokens=None, *args, **kwargs):
        """The stock method.

        Raises:
            UsageError: batches too small for one image, which fairseq would leave out, all of them.
        """
        values = math.prod(self.image_shape)
        if max_tokens is not None and max_tokens < values:
            raise UsageError(f"--max-tokens {max_tokens}: an image has {values} values; give at least so many, or --batch-size")
        return super().get_batch_iterator(dataset, max_tokens, *args, **kwargs)

    def build_model(self, cfg, *args, **kwargs):
        """The stock method; it must be a model that does not see the value that it predicts."""
        name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
        if not issubclass(ARCH_MODEL_REGISTRY.get(name, object), PixelModel):
            raise UsageError(f"--arch {name} is no model of images: give pixel_cnn or gated_pixel_cnn")
        return super().build_model(cfg, *args, **kwargs)

    def build_model_family(self, cfg):
        """What `earm_cross_entropy` must know of models of images."""
        return ImageFamily(cfg)

    def build_generator(self, *args, **kwargs):
        raise UsageError("fairseq-generate is for text: fairseq-earm-sample draws images")

    def reduce_metrics(self, logging_outputs, criterion):
        """The stock figures, and the un-smoothed loss under the name that it has for images."""
        super().reduce_metrics(logging_outputs, criterion)
        metrics.log_derived("bits_per_dim", _bits_per_dim)


def _bits_per_dim(meters) -> float:
    """cross_entropy logs no nll_loss where it is the loss."""
    return round(float(meters["nll_loss" if "nll_loss" in meters else "loss"].avg), 4)


def _remember(cfg, shape: str) -> None:
    """Put the shape into the configuration that the trainer writes into checkpoints."""
    if not OmegaConf.is_config(cfg):
        return
    cfg.image_shape = shape
    whole = cfg._get_parent()
    if whole is not None:
        whole.task.image_shape = shape
