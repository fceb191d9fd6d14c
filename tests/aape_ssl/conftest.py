"""For the tests of aape_ssl."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch

from aape_ssl.demo import command as demo
from aape_ssl.libraries import mend_torchvision

mend_torchvision()  # lightning, which these tests import, imports torchvision where it is installed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Clips are so short that a second thread only waits, for long where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half seconds of the clips that come along, two of each, and shorter ones of the short; not to be written to."""
    folder = tmp_path_factory.mktemp("clips")
    for path in demo.bundled_clips():
        samples, rate = soundfile.read(path)
        for n in range(2):
            start = n * (len(samples) // 2)
            soundfile.write(folder / f"{path.stem}-{n}.wav", samples[start : start + rate // 2], rate)
    return folder
