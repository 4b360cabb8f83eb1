"""The other ranks: they do what rank 0 tells, and print nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from ..decoding.costs import Costs
from ..decoding.loop import Loop
from ..decoding.request import Request
from ..decoding.session import Session
from ..distributed.group import Group, init
from ..distributed.watched import Watched
from ..engine import Engine, load
from ..errors import DgemmaError
from ..model import device
from ..serving.prefix_cache import PrefixCache
from .channel import Unpickler, call
from .leading import failure_in, outcome_of


class Apart(Exception):
    """This rank has come to something else than rank 0."""


class Follower:
    """What a rank knows that follows: an engine, and the objects that rank 0 told of, by their numbers.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self.engine: Engine | None = None
        self._group = group
        self._known: dict[int, Any] = {}
        self._cache: PrefixCache | None = None
        self._found: tuple[Session | None, int] = None, 0
        self._outcomes: dict[int, int] = {}  # of the last step of each loop

    def do(self, data: bytes) -> None:
        """Do what a message says.

        Raises:
            Apart: rank 0 came to something else.
        """
        what, *arguments, gone = Unpickler(data, self.engine).load()
        action: Callable[..., Any] = getattr(self, f"_on_{what}")
        action(*arguments)
        for number in gone:
            self._known.pop(number, None)
            self._outcomes.pop(number, None)

    def _on_load(self, name: str | None, keywords: dict[str, Any]) -> None:
        self.engine = load(name, group=self._group, **keywords)

    def _on_costs(self, costs: Costs) -> None:
        self._engine.costs = lambda: costs  # type: ignore[assignment]

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None
        return self.engine

    @property
    def _prefixes(self) -> PrefixCache:
        assert self._cache is not None
        return self._cache

    def _on_call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        with suppress(DgemmaError):  # rank 0 has the same, and tells it
            function(*arguments)

    def _on_loop(self, number: int) -> None:
        self._known[number] = self._engine.loop()
        self._outcomes[number] = 0

    def _on_session(self, number: int) -> None:
        self._known[number] = self._engine.session()

    def _on_add(
        self, loop: int, number: int, request: Request, session: int | None, found: int | None, snapshot_at: int
    ) -> None:
        held: Session | None = None
        if session is not None:
            held = self._known[session]
        elif found is not None:
            held = self._found[0]
            if held is None or len(held.cache_key) != found or self._found[1] != snapshot_at:
                raise Apart
        self._known[number] = request
        self._found = None, 0
        self._known[loop].add(request, held, snapshot_at)

    def _on_remove(self, loop: int, number: int) -> None:
        self._known[loop].remove(self._known[number])

    def _on_step(self, loop: int, outcome: int) -> None:
        if self._outcomes[loop] != outcome:
            raise Apart
        steps: Loop = self._known[loop]
        told = list(steps.step())
        if (error := failure_in(told)) is not None:
            raise error
        self._outcomes[loop] = outcome_of(told)

    def _on_cache(self, budget: int) -> None:
        self._cache = PrefixCache(self._engine, budget)

    def _on_find(self, wanted: list[int | str]) -> None:
        self._found = self._prefixes.find(wanted)

    def _on_keep(self, number: int) -> None:
        self._prefixes.keep(self._known[number])


def follow(me: Watched) -> int:
    """Follow rank 0 to its end; returns the exit code."""
    warnings.simplefilter("ignore")
    os.environ.pop("MLX_DGEMMA_MODEL", None)  # rank 0 names the model
    with me.failing():
        group = init()
        connection = call(me.place, group)
        try:
            with device.wired_limit():
                _obey(connection, Follower(group))
        except Apart:
            me.fail(
                f"Rank {me.place.rank} has computed something else than rank 0; give all ranks the same chip, macOS "
                "and versions, or one of them the whole model."
            )
    return 0


def _obey(connection: Connection, follower: Follower) -> None:
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return  # rank 0 has ended
        follower.do(data)
