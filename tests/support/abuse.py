"""How many examples the abuse tests draw, and a record of how many they drew.

LA2_EXAMPLES: of each property on each device (default 60). From 500 on, in 16 parts with seeds of their own, for
pytest-xdist to spread. LA2_EXAMPLES_SEED: other examples. LA2_EXAMPLES_LOG: a file that gets a line for each part.
"""

import functools
import json
import math
import os

import hypothesis
import pytest

EXAMPLES = int(os.environ.get("LA2_EXAMPLES", "60"))
SEED = int(os.environ.get("LA2_EXAMPLES_SEED", "0"))
PARTS = 16 if EXAMPLES >= 500 else 1


def property_test(examples=1.0, **strategies):
    """Like hypothesis.given, for a test that takes `device` and the strategies: EXAMPLES times `examples` of them."""

    def decorate(test):
        each = max(1, math.ceil(EXAMPLES * examples / PARTS))

        @pytest.mark.parametrize("part", range(PARTS))
        @functools.wraps(test, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())
        def run(device, part):
            drawn = 0

            @hypothesis.seed(SEED * PARTS + part)
            @hypothesis.settings(max_examples=each, derandomize=False, database=None, deadline=None)
            @hypothesis.given(**strategies)
            def examples(**values):
                nonlocal drawn
                test(device, **values)
                drawn += 1

            examples()
            _log(test.__name__, device, drawn)

        del run.__wrapped__  # pytest would take the test's own signature
        return run

    return decorate


def _log(name, device, drawn):
    path = os.environ.get("LA2_EXAMPLES_LOG")
    if path:
        with open(path, "a") as file:  # short lines: whole, whoever else writes
            file.write(json.dumps({"test": name, "device": device, "examples": drawn}) + "\n")
