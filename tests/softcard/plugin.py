"""``pytest -p softcard.plugin``: the cuda backends of this process launch on a card in software."""

from contextlib import ExitStack

import pytest

from softcard.card import plugged_in

__all__ = ["pytest_addoption", "pytest_load_initial_conftests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capability", type=int, default=90, help="of the card: 80 or 90")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before tests ask which backends there are."""
    stack = ExitStack()
    stack.enter_context(plugged_in(early_config.known_args_namespace.capability))
    early_config.add_cleanup(stack.close)
