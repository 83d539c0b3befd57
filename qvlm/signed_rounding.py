"""Signed gradient descent on rounding: which way each weight of a block rounds, and its scales, from the block's loss.

prototype
"""
from __future__ import annotations

from dataclasses import dataclass, field
from collections.abc import Callable, Mapping, Sequence
import torch
from torch import Tensor, nn

from qvlm import affine
from qvlm.affine import QuantizedWeight

EDGE = 0.499

class SoftWeight:
    def __init__(self, start: QuantizedWeight, real: Tensor, bits: int) -> None:
        self.bits = bits
        self.start = start
        q = start.integers.float()
        self.rows, self.cols = q.shape
        self.groups = start.scale.shape[1]
        self.base = real.float().clamp(q - EDGE, q + EDGE)
        self.v = torch.zeros_like(q)
        self.a = torch.zeros_like(start.scale)
        self.zero = 0.0 if start.zero_point is None else self._spread(start.zero_point.float())

    def _spread(self, x):
        return x.repeat_interleave(self.cols // self.groups, 1).expand(self.rows, self.cols)

    def scale(self):
        return (self.start.scale * (1 + self.a)).to(torch.float16).float().clamp(min=affine.SMALLEST_SCALE)

    def parts(self):
        s = self.scale()
        u = self.base * self._spread(self.start.scale / s) + self.v
        lo, hi = affine.integer_range(self.bits)
        q = torch.round(u).clamp(lo, hi)
        return s, u, q

    def weight(self):
        s, u, q = self.parts()
        return self._spread(s) * (q - self.zero)

    def step(self, grad, lr, scale_lr):
        s, u, q = self.parts()
        lo, hi = affine.integer_range(self.bits)
        inside = ((u >= lo - .5) & (u <= hi + .5)).float()
        # a clamped weight may still come back: its v moves if that is downhill
        if lr:
            self.v -= lr * torch.sign(grad * inside)
            self.v.clamp_(-0.5, 0.5)
        if scale_lr:
            da = grad * ((q - self.zero) - inside * (u - self.v))
            if self.start.scale.shape[0] == 1:
                da = da.sum().reshape(1, 1)
            else:
                da = da.reshape(self.rows, self.groups, -1).sum(-1)
            self.a -= scale_lr * torch.sign(da)

    def snapshot(self) -> QuantizedWeight:
        s, u, q = self.parts()
        return QuantizedWeight(q.to(torch.int8), s, self.start.zero_point)
