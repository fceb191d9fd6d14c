"""For the tests of benchmarks/evidence."""

from collections.abc import Iterator

import pytest
import torch

from aape_ssl.libraries import mend_torchvision

mend_torchvision()  # lightning, which these tests import, imports torchvision where it is installed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Clips are so short that a second thread only waits, for long where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
