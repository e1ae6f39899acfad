"""Shared by the tests of the operators and of the reference: random problems, their truth, derived tolerances."""
