"""Log-probabilities on the host: arrays as the device reports them, made into objects only where somebody reads them.

A prompt of 2,000 tokens with 20 alternatives each is 40,000 pairs. As arrays they are copied in microseconds, which
matters, since steps are committed under the scheduler's lock; as objects they are made row by row by who writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from jaxserve.core.types import TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobTable:
    """Log-probabilities of a row a token, as the device reports them.

    Attributes:
        token_ids: [R] int32; the token each row is about.
        logprob: [R] float32.
        rank: [R] int32, 1 is the most likely.
        top_ids: [R, k] int32; k is MAX_LOGPROBS as the device reports them.
        top_logprobs: [R, k] float32.
    """

    token_ids: NDArray[np.int32]
    logprob: NDArray[np.float32]
    rank: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    def row(self, index: int, num_top: int) -> TokenLogprobs:
        """One row as the API reports it, with `num_top` alternatives."""
        return next(self.rows(index, index + 1, num_top))

    def rows(self, start: int, stop: int, num_top: int) -> Iterator[TokenLogprobs]:
        """Rows [start, stop) as the API reports them, with `num_top` alternatives each."""
        columns = (self.token_ids[start:stop], self.logprob[start:stop], self.rank[start:stop])
        tops = (self.top_ids[start:stop, :num_top], self.top_logprobs[start:stop, :num_top])
        for token_id, logprob, rank, ids, values in zip(*(c.tolist() for c in (*columns, *tops)), strict=True):
            top = tuple(zip(ids, values, strict=True))
            yield TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=top)

    def copy_of(self, start: int, stop: int, num_top: int) -> LogprobTable:
        """A table of rows [start, stop) and `num_top` alternatives, which keeps nothing of this one alive."""
        return LogprobTable(
            token_ids=self.token_ids[start:stop].copy(),
            logprob=self.logprob[start:stop].copy(),
            rank=self.rank[start:stop].copy(),
            top_ids=self.top_ids[start:stop, :num_top].copy(),
            top_logprobs=self.top_logprobs[start:stop, :num_top].copy(),
        )

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.generic]]) -> LogprobTable:
        """A table of arrays by field name."""
        return cls(**arrays)  # type: ignore[arg-type]  # numpy arrays of the dtypes above, by the device's types


class PromptLogprobs(Sequence[TokenLogprobs | None]):
    """An entry for each prompt token, None for the first; entries are made when they are read.

    Equal to any sequence of the same entries.
    """

    __slots__ = ("_tables",)

    def __init__(self) -> None:
        self._tables: list[LogprobTable] = []

    def add(self, table: LogprobTable) -> None:
        """Takes over the rows of the next prompt tokens."""
        self._tables.append(table)

    def __len__(self) -> int:
        return 1 + sum(len(table.token_ids) for table in self._tables)

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs | None: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[TokenLogprobs | None, ...]: ...

    def __getitem__(self, index: int | slice) -> TokenLogprobs | tuple[TokenLogprobs | None, ...] | None:
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            return tuple(self._between(start, stop)) if stride == 1 else tuple(self)[index]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        return next(self._between(position, position + 1))

    def __iter__(self) -> Iterator[TokenLogprobs | None]:
        return self._between(0, len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as other containers that can grow

    def _between(self, start: int, stop: int) -> Iterator[TokenLogprobs | None]:
        if start <= 0 < stop:
            yield None
        first = 1
        for table in self._tables:
            count = len(table.token_ids)
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                yield from table.rows(low, high, table.top_ids.shape[1])
            first += count
