"""The recorder of launches, built once; its tests are one worker's, so that PTX is compiled once as well."""

from types import ModuleType

import emulated
import pytest
from ptx_backend import NVCC, Interpreter, build_recorder, use


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if NVCC is None or emulated.compiler() is None:
        pytest.skip("no nvcc or no host compiler was found")
    return build_recorder(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def interpreter(recorder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    """What backend "cuda" runs on in the test."""
    interpreter = Interpreter(recorder)
    use(monkeypatch, interpreter)
    return interpreter
