"""A replaced stem under transformers' own loading and saving, by the class that docs/models.md shows."""

import re
from pathlib import Path

import pytest
import torch
from known_models import hf_ast, randomised
from libraries import transformers
from oracle import relative_error

from aape_kernels import replace_stem

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


@pytest.fixture(scope="module")
def with_aape():
    """The class in the page."""
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[1], names)
    return names["ASTWithAaPE"]


def branch(model):
    return model.audio_spectrogram_transformer.embeddings.patch_embeddings.projection


@torch.no_grad()
def test_a_checkpoint_without_aape(with_aape, tmp_path):
    plain, x = randomised(hf_ast()), torch.randn(2, 64, 32)
    plain.save_pretrained(tmp_path)
    model = with_aape.from_pretrained(tmp_path)
    assert relative_error(model(x).logits, plain(x).logits) <= 1e-5
    stem = branch(model)
    assert not stem.fusion.weight.any()
    states = stem.num_states
    torch.testing.assert_close(torch.sigmoid(stem.encoder.b2)[states:], (torch.arange(states) + 0.5) / states)
    for weight in (stem.encoder.w1, stem.sblu.weight):
        limit = weight[0].numel() ** -0.5
        assert limit / 2 < weight.abs().max() <= limit


@torch.no_grad()
def test_a_checkpoint_with_aape(with_aape, tmp_path):
    model, x = randomised(with_aape(hf_ast().config)), torch.randn(2, 64, 32)
    model.save_pretrained(tmp_path)
    assert torch.equal(with_aape.from_pretrained(tmp_path)(x).logits, model(x).logits)


@torch.no_grad()
def test_replacing_what_from_pretrained_returned(tmp_path):
    plain, x = randomised(hf_ast()), torch.randn(2, 64, 32)
    plain.save_pretrained(tmp_path)
    model = replace_stem(transformers.ASTForAudioClassification.from_pretrained(tmp_path))
    assert relative_error(model(x).logits, plain(x).logits) <= 1e-5
    other = replace_stem(hf_ast()).eval()
    other.load_state_dict(randomised(model).state_dict())
    assert torch.equal(other(x).logits, model(x).logits)
