"""Every collective of a run: work on all ranks, and what they must agree on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import ICAError

T = TypeVar("T")


class Ranks:
    """The processes of a run, as the trainer's accelerator has them.

    Args:
        accelerator: the trainer's.

    Attributes:
        index: this process.
        count: number of processes.
        is_main: whether this one writes files.
    """

    def __init__(self, accelerator: Accelerator):
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process

    def share(self, rows: list[int]) -> list[int]:
        """This rank's share of rows that all ranks pass alike."""
        return rows[self.index :: self.count]

    def joined(self, shares: list[list[T]], count: int) -> list[T]:
        """What was made of every rank's `share`, in the order of all `count` rows."""
        result: list[Any] = [None] * count
        for first, part in enumerate(shares):
            result[first :: self.count] = part
        return result

    def all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` here and return every rank's result, by rank.

        Raises:
            ICAError: it failed on another rank; a rank on which it failed raises its own error.
        """
        if self.count == 1:
            return [work()]
        result = error = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        gathered = gather_object([(result, None if error is None else repr(error))])
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise ICAError(f"scoring failed on rank {rank}: {failure}")
        return [part for part, _ in gathered]

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process and return its result on all."""
        return self.all(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.all(lambda: here))

    def agree(self, facts: dict[str, Any]) -> None:
        """Compare what every rank holds.

        Rows and weights are matched by row number, and each rank looks them up in its own data: ranks that hold other rows, or
        the same in another order, would train with weights of other rows.

        Args:
            facts: by the name that a user knows it by; values of JSON types.

        Raises:
            ICAError: a rank holds something else than rank 0.
        """
        everyone = self.all(lambda: json.loads(json.dumps(facts)))
        for rank, other in enumerate(everyone):
            differs = [name for name in everyone[0] if other.get(name) != everyone[0][name]]
            if differs:
                raise ICAError(
                    f"rank {rank} holds other data than rank 0: {', '.join(differs)} differ. Every rank must load the same rows in the "
                    "same order: give the same files and seeds to all, and shuffle with a fixed seed."
                )
