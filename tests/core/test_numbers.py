"""What the device computes in fewer instructions than the obvious way: divisions and powers of the decay."""

import math
import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

INT32_MAX = 2**31 - 1
INT64 = st.one_of(st.integers(0, 2**62), st.integers(0, INT32_MAX), st.integers(0, 300))


@given(n=INT64, divisor=st.one_of(st.integers(1, 2**62), st.integers(1, INT32_MAX), st.integers(1, 300)))
@example(n=INT32_MAX, divisor=1)
@example(n=INT32_MAX, divisor=INT32_MAX)
@example(n=INT32_MAX - 1, divisor=INT32_MAX)
@example(n=INT32_MAX, divisor=2**30)
@example(n=INT32_MAX, divisor=2**30 + 1)
@example(n=INT32_MAX, divisor=INT32_MAX + 1)
@example(n=0, divisor=7)
@settings(deadline=None, max_examples=2000)
def test_quotient(core, n, divisor):
    assert core.quotient(n, divisor) == n // divisor


@given(multiple=st.integers(0, INT32_MAX), divisor=st.integers(1, INT32_MAX), off=st.integers(-1, 1))
@settings(deadline=None, max_examples=2000)
def test_quotient_at_multiples(core, multiple, divisor, off):
    """Where rounding the wrong way would show."""
    n = max(0, min(multiple // divisor * divisor + off, INT32_MAX))
    assert core.quotient(n, divisor) == n // divisor


def ulp(x):
    return math.ldexp(1.0, max(math.frexp(x)[1] - 24, -149))


@given(
    slope=st.floats(2**-24, 128, width=32),
    n=st.one_of(st.integers(0, 64), st.integers(0, 4096), st.integers(0, INT32_MAX)),
)
@settings(deadline=None, max_examples=5000)
def test_decay_powers_are_within_two_units_of_the_last_place(core, slope, n):
    """In units of the last place of a result p: rounding it 0.5; the sum 1 + (...), whose second part is below 0.42,
    0.25; two roundings of r, each 2^-26, times p, 0.5; the series cut off at r^8 / 8!, |r| < 0.35, and the roundings of
    its coefficients 0.15. Largest seen: 1.21."""
    exact = math.exp(-slope * n)
    got = core.rounded_decay_power(slope, n)
    if exact < 2**-125:
        assert 0 <= got <= 2**-124
    else:
        assert abs(got - exact) <= 1.5 * ulp(exact)


def test_decay_powers_are_as_good_as_rounded_ones_on_average(core):
    slopes = [struct.unpack("f", struct.pack("f", 2 ** -(8 * (h + 1) / 64)))[0] for h in range(64)]
    errors = [
        abs(core.rounded_decay_power(s, n) - math.exp(-s * n)) / ulp(math.exp(-s * n))
        for s in slopes
        for n in range(1, 65)
        if s * n < 80
    ]
    assert sum(errors) / len(errors) < 0.28  # of a result that is rounded once: 0.25


def test_ends_of_the_decay(core):
    power = core.rounded_decay_power
    assert power(0.0, 64) == 1.0 and power(0.0, INT32_MAX) == 1.0
    assert power(math.inf, 0) == 1.0 and power(math.inf, 3) == 0.0 and power(1e4, 1) == 0.0
    assert math.isnan(power(math.nan, 0)) and math.isnan(power(math.nan, 5))
