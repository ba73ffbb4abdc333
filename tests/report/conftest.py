"""The rows and the browser of the tests of evaluation."""

from tests.evaluate.conftest import browser, facts, make_rows  # noqa: F401
