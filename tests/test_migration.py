"""State dicts of earlier releases load, and give the tokens they gave.

`tests/data/state-<_version>.pt` holds what that version's `state_dict()` was, of a stem and of a convolution that
`replace_stem` had replaced, with an input and what came of it in float64. Files are added, never written again.
"""

import pickle
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


@torch.no_grad()
@pytest.mark.parametrize("metadata", [True, False], ids=["torch.save", "safetensors"])
def test_two_planes_become_three(metadata):
    """Version 1 had no n: into "complex" as it is, into "both" with zeros in n's place, to the same tokens."""
    saved = torch.load(DATA / "state-1.pt", weights_only=True)
    state = saved["stem"] if metadata else dict(saved["stem"])
    sizes = {"patch_size": (6, 4), "in_chans": 2, "embed_dim": 8, "stride": (4, 3), "window": 6, **OPTIONS}
    before = {name: value.clone() for name, value in state.items()}
    for features, planes in (("both", 3), ("complex", 2)):
        stem = AaPE(**sizes, features=features).double()
        stem.load_state_dict(state)
        assert stem.fusion.weight.shape == (8, planes, 3)
        assert relative_error(stem(saved["x"]), saved["tokens"]) <= 1e-12
    assert all(torch.equal(state[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match=r"size mismatch for fusion\.weight"):
        AaPE(**sizes, features="magnitude").double().load_state_dict(state)


def test_other_features_of_this_version_are_refused():
    """A stem of "complex" saved now is no stem of "both": nothing is filled in silently."""
    options = {"patch_size": 4, "embed_dim": 8, **OPTIONS}
    state = AaPE(**options, features="complex").state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for fusion\.weight"):
        AaPE(**options).load_state_dict(state)


def test_a_pickle_of_the_whole_module_from_before_features():
    stem = AaPE(patch_size=4, embed_dim=8, **OPTIONS, features="complex")
    del stem.__dict__["features"]
    old = pickle.loads(pickle.dumps(stem))
    x = torch.randn(1, 1, 8, 8)
    assert old.features == "complex"
    assert torch.equal(old(x), stem(x))
