"""Processes for tests of several ranks."""

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """`ranks(world)`: a gloo group of so many processes, started when it is first asked for."""
    started = {}

    def get(world):
        if world not in started:
            started[world] = Ranks(world)
        return started[world]

    yield get
    for processes in started.values():
        processes.close()
