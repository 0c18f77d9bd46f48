"""``pytest -p softcard.plugin``: this process's cuda backends compute on a card in software."""

import os
from contextlib import ExitStack

import pytest

__all__ = ["pytest_addoption", "pytest_load_initial_conftests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("card")
    group.addoption("--capability", type=int, default=90, help="kernels are compiled for: 80 or 90")
    group.addoption(
        "--whole", metavar="WHEN",
        help="graphs, streams and memory are the card's, too. What is queued is done late, once "
        "(at once), beside (late on the default stream alone), or when a seed says. Kernels are "
        "interpreted if TRITON_INTERPRET is set",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before tests ask which backends there are."""
    # Triton reads TRITON_INTERPRET when it is imported, and this by pytest before anything else.
    from softcard.card import plugged_in
    from softcard.whole import whole_card

    given, stack = early_config.known_args_namespace, ExitStack()
    if given.whole is None:
        stack.enter_context(plugged_in(given.capability))
    else:
        policy = int(given.whole) if given.whole.isdigit() else given.whole
        capability = None if os.environ.get("TRITON_INTERPRET") == "1" else given.capability
        stack.enter_context(whole_card(capability, policy=policy))
    early_config.add_cleanup(stack.close)
