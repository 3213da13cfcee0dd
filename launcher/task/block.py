"""Rows of equal length that hold tokens only, as one array: a batch without a copy per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from launcher.task import Row

Ints = NDArray[np.int64]


class TokenBlock(Sequence[Row]):
    """Like a list of rows; `tokens` is (rows, tokens), `samples` and `epochs` are (rows,), all int64."""

    def __init__(self, tokens: Ints, samples: Ints, epochs: Ints) -> None:
        self.tokens, self.samples, self.epochs = tokens, samples, epochs

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, which: int) -> Row: ...

    @overload
    def __getitem__(self, which: slice) -> TokenBlock: ...

    def __getitem__(self, which: int | slice) -> Row | TokenBlock:
        if isinstance(which, slice):
            return TokenBlock(self.tokens[which], self.samples[which], self.epochs[which])
        sample, epoch = int(self.samples[which]), int(self.epochs[which])
        return {"input_ids": self.tokens[which], "sample": sample, "epoch": epoch}
