"""State dicts of earlier releases load, and give the tokens they gave.

`tests/data/state-<_version>.pt` holds what that version's `state_dict()` was, of a stem and of a convolution that
`replace_stem` had replaced, with an input and what came of it in float64. Files are added, never written again.
"""

from pathlib import Path

import pytest
import torch
from oracle import relative_error
from torch import nn

from aape_kernels import AaPE, replace_stem

DATA = Path(__file__).parent / "data"
OPTIONS = {"num_states": 3, "encoder_dim": 4}


@torch.no_grad()
@pytest.mark.parametrize("version", range(1, AaPE._version + 1))
def test_state_of(version):
    saved = torch.load(DATA / f"state-{version}.pt", weights_only=True)
    assert saved["stem"]._metadata[""]["version"] == version
    stem = AaPE(patch_size=(6, 4), in_chans=2, embed_dim=8, stride=(4, 3), window=6, **OPTIONS).double()
    stem.load_state_dict(saved["stem"])
    assert relative_error(stem(saved["x"]), saved["tokens"]) <= 1e-12

    model = nn.ModuleDict({"stem": nn.Conv2d(2, 8, (4, 6), (3, 4))}).double()
    replace_stem(model, path="stem", layout="TF", **OPTIONS)
    model.load_state_dict(saved["replaced"])
    assert relative_error(model["stem"](saved["x"].transpose(2, 3)), saved["features"]) <= 1e-12
