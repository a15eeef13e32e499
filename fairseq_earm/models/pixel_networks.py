"""PixelCNN (van den Oord et al. 2016a) and Gated PixelCNN (2016b), on whole images or value by value.

Each network says once how its convolutions are put together; whether they see an image or one value of it is up to who
applies them. Everything else in a network is done feature by feature.
"""
from __future__ import annotations

from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_earm.models.masked_convolution import MaskedConv2d, RowByRow, RowsConv2d, ValueByValue

# From a convolution and its inputs to its outputs.
Apply = Callable[[nn.Module, Optional[Tensor]], Tensor]


class PixelNetwork(nn.Module):
    """From images to the logits of each of their values.

    Attributes:
        colours: values of a pixel.
        first: the convolution that reads the image and not the pixel itself.
    """

    colours: int
    first: MaskedConv2d

    def rows(self, images: Tensor, apply: Apply) -> List[Tensor]:
        """What whole rows say to the row below: tensors (B, F, H, W), each for one convolution of that row."""
        return []

    def pixels(self, images: Optional[Tensor], above: List[Tensor], apply: Apply) -> Tensor:
        """Logits (B, colours · levels, H, W), colour by colour, from the image and what `rows` say."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(B, colours, H, W) values from −1 to 1 → (B, colours · levels, H, W)."""
        above = [F.pad(rows, (0, 0, 1, 0))[:, :, :-1] for rows in self.rows(images, _whole)]
        return self.pixels(images, above, _whole)

    def _head(self, features: int, hidden: int, levels: int) -> nn.ModuleList:
        hide = MaskedConv2d(features, hidden, colours=self.colours)
        return nn.ModuleList([hide, MaskedConv2d(hidden, self.colours * levels, colours=self.colours)])


def _whole(convolution: nn.Module, images: Tensor) -> Tensor:
    return convolution(images)


class PlainPixelCnn(PixelNetwork):
    """Masked convolutions in residual blocks. Pixels to the upper right are seen only where the kernels' widths add up to them.

    Args:
        colours: of the image.
        levels: that a value may have.
        features: of the residual stream; the convolutions between read and write half of them.
        layers: residual blocks.
        first_size, size: widths of the first kernel and of the others, odd.
        hidden: features before the logits.
    """

    def __init__(self, colours: int, levels: int, *, features: int, layers: int, first_size: int, size: int, hidden: int):
        super().__init__()
        self.colours = colours
        self.first = MaskedConv2d(colours, features, colours=colours, size=first_size, sees_itself=False)
        self.blocks = nn.ModuleList(nn.ModuleList(_block(colours, features, size)) for _ in range(layers))
        self.head = self._head(features, hidden, levels)

    def pixels(self, images, above, apply):
        features = apply(self.first, images)
        for block in self.blocks:
            inner = features
            for convolution in block:
                inner = apply(convolution, inner.relu())
            features = features + inner
        for convolution in self.head:
            features = apply(convolution, features.relu())
        return features


def _block(colours: int, features: int, size: int) -> Tuple[MaskedConv2d, ...]:
    half = features // 2
    sizes = ((features, half, 1), (half, half, size), (half, features, 1))
    return tuple(MaskedConv2d(inputs, outputs, colours=colours, size=width) for inputs, outputs, width in sizes)


class GatedPixelCnn(PixelNetwork):
    """A vertical stack that sees all rows above, a horizontal one that sees the row: no pixel within reach is missed.

    Args:
        features: of each stack; a convolution has twice as many outputs, which gate each other.
        layers: of both stacks, the first one included.
        The others as for `PlainPixelCnn`.
    """

    def __init__(self, colours: int, levels: int, *, features: int, layers: int, first_size: int, size: int, hidden: int):
        super().__init__()
        self.colours = colours
        self.layers = nn.ModuleList([_GatedLayer(colours, colours, features, first_size, first=True)])
        self.layers.extend(_GatedLayer(colours, features, features, size, first=False) for _ in range(layers - 1))
        self.head = self._head(features, hidden, levels)

    @property
    def first(self) -> MaskedConv2d:
        return self.layers[0].horizontal

    def rows(self, images, apply):
        above, features = [], images
        for layer in self.layers:
            vertical = apply(layer.vertical, features)
            above.append(layer.down(vertical))
            features = _gate(vertical)
        return above

    def pixels(self, images, above, apply):
        features = images
        for number, (layer, rows) in enumerate(zip(self.layers, above)):
            gated = apply(layer.project, _gate(apply(layer.horizontal, features) + rows))
            features = gated if number == 0 else gated + features
        for convolution in self.head:
            features = apply(convolution, features.relu())
        return features


class _GatedLayer(nn.Module):
    """The convolutions of one layer, from so many input features to so many output features in each stack."""

    def __init__(self, colours: int, inputs: int, features: int, size: int, *, first: bool):
        super().__init__()
        self.vertical = RowsConv2d(inputs, 2 * features, size)
        self.down = nn.Conv2d(2 * features, 2 * features, 1)
        self.horizontal = MaskedConv2d(
            inputs, 2 * features, colours=colours, size=size, sees_itself=not first, rows_above=False, halves=2
        )
        self.project = MaskedConv2d(features, features, colours=colours)


def _gate(features: Tensor) -> Tensor:
    values, gates = features.chunk(2, 1)
    return values.tanh() * gates.sigmoid()


class Stepwise:
    """A network's logits of one value after the other, by rows, pixels and colours, for a batch of images that come to be.

    Only what a new value changes is computed; the logits are those of the whole image. The weights are those at the time
    when this is made, and there are no gradients.

    Args:
        network: in any mode.
        batch: number of images.
        height, width: of the images.
    """

    def __init__(self, network: PixelNetwork, batch: int, height: int, width: int):
        self.network = network
        like = network.first.weight
        self.values = like.new_zeros(batch, network.colours, height, width)
        modules = list(network.modules())
        self.convolutions = {m: ValueByValue(m, batch, width) for m in modules if isinstance(m, MaskedConv2d)}
        self.row_convolutions = {m: RowByRow(m, batch, width) for m in modules if isinstance(m, RowsConv2d)}
        self.position = 0

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, levels) of the next value."""
        row, column, colour = self._place()
        if colour == 0 and column == 0:
            self._next_row(row)
        if colour == 0:
            for convolution in self.convolutions.values():
                convolution.column = column
        above = [rows[colour][column] for rows in self.above]
        return self.network.pixels(None, above, lambda convolution, features: self._apply(convolution, features, colour))

    @torch.no_grad()
    def append(self, values: Tensor) -> None:
        """The next value of each image, (B,), from −1 to 1; its logits must have been asked for."""
        row, column, colour = self._place()
        self.values[:, colour, row, column] = values
        self.convolutions[self.network.first].put(values.unsqueeze(1), colour)
        self.position += 1

    def _place(self) -> Tuple[int, int, int]:
        pixel, colour = divmod(self.position, self.network.colours)
        return (*divmod(pixel, self.values.size(3)), colour)

    def _next_row(self, row: int) -> None:
        for convolution in self.convolutions.values():
            convolution.next_row()
        if row == 0:
            above = [torch.zeros_like(rows) for rows in self.network.rows(self.values[:, :, :1], _whole)]
        else:
            above = self.network.rows(self.values[:, :, row - 1 : row], self._apply_rows)
        first = self.convolutions[self.network.first]
        self.above = [first.by_colour(rows.squeeze(2).permute(2, 0, 1)) for rows in above]

    def _apply_rows(self, convolution: RowsConv2d, row: Tensor) -> Tensor:
        return self.row_convolutions[convolution](row)

    def _apply(self, convolution: MaskedConv2d, features: Optional[Tensor], colour: int) -> Tensor:
        steps = self.convolutions[convolution]
        if convolution.sees_itself:
            steps.put(features, colour)
        return steps.get(colour)
