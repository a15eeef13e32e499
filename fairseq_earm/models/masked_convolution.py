"""Convolutions that see nothing of an image but what comes before, and the same ones evaluated value by value.

An image's values are ordered by rows, within a row by pixels, within a pixel by colours. Features are divided among the
colours: those of colour c know the pixel's colours before c, or up to c (masks A and B of van den Oord et al. 2016a).
"""
from __future__ import annotations

import math
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def colour_bounds(features: int, colours: int) -> List[int]:
    """Features bounds[c] to bounds[c + 1] − 1 belong to colour c; they are divided as evenly as can be."""
    return [-(-colour * features // colours) for colour in range(colours + 1)]


def _colours_of(features: int, colours: int) -> Tensor:
    return torch.arange(features) * colours // features


class MaskedConv2d(nn.Module):
    """A convolution over the pixels before each pixel, and over what its own features may know of it.

    Args:
        inputs, outputs: numbers of features.
        colours: of the image.
        size: width of the kernel, odd; 1 looks at no other pixel.
        sees_itself: mask B, features of colour c read those of colours up to c; mask A: of colours before c.
        rows_above: whether rows above are read, size // 2 of them, or the pixels to the left alone.
        halves: the outputs are so many times outputs / halves features, each divided among the colours.
    """

    def __init__(
        self, inputs: int, outputs: int, *, colours: int, size: int = 1, sees_itself: bool = True, rows_above: bool = True,
        halves: int = 1,
    ):
        super().__init__()
        self.colours, self.halves, self.sees_itself = colours, halves, sees_itself
        self.reach = size // 2
        self.above = self.reach if rows_above else 0
        right = self.reach if rows_above else 0
        self.padding = (self.reach, right, self.above, 0)
        self.input_bounds = colour_bounds(inputs, colours)
        self.output_bounds = colour_bounds(outputs // halves, colours)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, self.above + 1, self.reach + 1 + right))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.register_buffer("mask", self._mask(inputs, outputs), persistent=False)
        self._initialise()

    def _mask(self, inputs: int, outputs: int) -> Tensor:
        mask = torch.ones_like(self.weight)
        mask[:, :, -1, self.reach + 1 :] = 0
        mine, theirs = _colours_of(outputs // self.halves, self.colours).repeat(self.halves), _colours_of(inputs, self.colours)
        known = theirs <= mine.unsqueeze(1) if self.sees_itself else theirs < mine.unsqueeze(1)
        mask[:, :, -1, self.reach] = known.to(mask)
        return mask

    def _initialise(self) -> None:
        """As torch does it, but by the inputs that are seen."""
        bound = 1 / math.sqrt(max(float(self.mask.sum()) / len(self.weight), 1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @property
    def visible_weight(self) -> Tensor:
        """(outputs, inputs, rows, columns) weights, 0 where masked; the pixel itself is in the last row, column `reach`."""
        return self.weight * self.mask

    def forward(self, features: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        return F.conv2d(F.pad(features, self.padding), self.visible_weight, self.bias)

    def of_colour(self, outputs: Tensor, colour: int) -> Tensor:
        """(N, outputs) → those of one colour, half after half."""
        if self.colours == 1:
            return outputs
        start, end = self.output_bounds[colour : colour + 2]
        return outputs.reshape(len(outputs), self.halves, self.output_bounds[-1])[:, :, start:end].flatten(1)


class RowsConv2d(nn.Conv2d):
    """A convolution over each row and the size // 2 rows above it, in their whole width."""

    def __init__(self, inputs: int, outputs: int, size: int):
        self.reach = size // 2
        super().__init__(inputs, outputs, (self.reach + 1, 2 * self.reach + 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        return super().forward(F.pad(features, (self.reach, self.reach, self.reach, 0)))


class RowByRow:
    """A `RowsConv2d` that is given one row after the other of a batch of images, `width` pixels wide."""

    def __init__(self, convolution: RowsConv2d, batch: int, width: int):
        self.convolution = convolution
        self.before = convolution.weight.new_zeros(batch, convolution.in_channels, convolution.reach, width)

    def __call__(self, row: Tensor) -> Tensor:
        """(B, inputs, 1, W) the next row → (B, outputs, 1, W)."""
        reach = self.convolution.reach
        rows = torch.cat([self.before, row], 2)
        self.before = rows[:, :, 1:]
        return F.conv2d(F.pad(rows, (reach, reach, 0, 0)), self.convolution.weight, self.convolution.bias)


class ValueByValue:
    """A `MaskedConv2d` that is given one value after the other of a batch of images, `width` pixels wide.

    What comes from the rows above is computed once a row, for the whole row; the rest once a colour, for the features of
    that colour. The weights are those at the time when this is made.
    """

    def __init__(self, convolution: MaskedConv2d, batch: int, width: int):
        self.convolution = convolution
        weight, bias = convolution.visible_weight.detach(), convolution.bias.detach()
        self.reach, above, inputs = convolution.reach, convolution.above, weight.size(1)
        self.bias, self.from_above = bias, weight[:, :, :above]
        # The pixels to the left and the pixel itself, feature after feature: what is known at a colour comes first.
        row = weight[:, :, above, : self.reach + 1].permute(2, 1, 0).flatten(0, 1)
        bounds = convolution.input_bounds
        ends = [self.reach * inputs + end for end in (bounds[1:] if convolution.sees_itself else bounds[:-1])]
        self.from_row = [convolution.of_colour(row[:end], colour).contiguous() for colour, end in enumerate(ends)]
        self.context = self.by_colour(bias.expand(width, batch, -1))
        # Features come last, so that neighbours in a row are one vector.
        self.known = weight.new_zeros(batch, above + 1, width + sum(convolution.padding[:2]), inputs)
        self.column = 0

    def by_colour(self, outputs: Tensor) -> List[Tensor]:
        """(W, B, outputs) → (W, B, outputs of that colour) for each colour."""
        parts = [self.convolution.of_colour(outputs.flatten(0, 1), colour) for colour in range(self.convolution.colours)]
        return [part.reshape(*outputs.shape[:2], -1) for part in parts]

    def next_row(self) -> None:
        """Begin a row."""
        above = self.convolution.above
        if above > 0:
            self.known = F.pad(self.known[:, 1:], (0, 0, 0, 0, 0, 1))
            rows = F.conv2d(self.known[:, :above].permute(0, 3, 1, 2), self.from_above, self.bias)
            self.context = self.by_colour(rows.squeeze(2).permute(2, 0, 1))

    def put(self, features: Tensor, colour: int) -> None:
        """Note the inputs of one colour at the pixel in `column`, (B, inputs of that colour)."""
        start, end = self.convolution.input_bounds[colour : colour + 2]
        self.known[:, -1, self.reach + self.column, start:end] = features

    def get(self, colour: int) -> Tensor:
        """(B, outputs of that colour) at the pixel in `column`, from what was put until now."""
        weight = self.from_row[colour]
        row = self.known[:, -1, self.column : self.column + self.reach + 1].flatten(1)
        return torch.addmm(self.context[colour][self.column], row[:, : weight.size(0)], weight)
