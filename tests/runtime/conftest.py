"""Limits of real machines, as the tests of plans have them."""

from tests.planning.conftest import cgroup

__all__ = ["cgroup"]
