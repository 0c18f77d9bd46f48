"""Everything at once on a card in software: each reply has the tokens of the request alone.

As ``test_engine_stress.py`` has it for other backends. What is queued is done as late as CUDA
allows, where the plugin says so (``--whole late``); elsewhere it runs on CPU tensors, or a GPU.
"""

from pathlib import Path

import pytest

from quire.backends import backend_status
from quire.errors import ConfigError
from test_engine_stress import Stress, assert_replies_are_those_of_each_alone

RUNS = any(status.name == "cuda-exact" and status.available for status in backend_status())
pytestmark = pytest.mark.skipif(not RUNS, reason="the cuda backend is off")
FEW, MORE = (1,), range(2, 40)


@pytest.mark.parametrize("seed", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
@pytest.mark.parametrize("kind", ["full", "mixed", "sliding"])
def test_anything_at_once_gives_what_each_request_gives_alone(
    models: dict[str, Path], tmp_path: Path, kind: str, seed: int
) -> None:
    try:
        stress = Stress(models[kind], tmp_path, 77_000 + seed, ("cuda-exact",))
    except ConfigError as error:
        pytest.skip(f"refused: {error}")  # a tier that is too small for the pages
    stress.run()
    assert_replies_are_those_of_each_alone(stress)
