"""AaPE where timm builds the stem: `create_model(..., embed_layer=AaPE)` as it stands."""

import math
import re
from functools import partial

import pytest
import torch
from libraries import timm
from oracle import relative_error
from timm.layers import PatchEmbed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from aape_kernels import AaPE, replace_stem

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}


def vit(name="vit_tiny_patch16_224", **options):
    sizes = {"img_size": (32, 96), "in_chans": 1, "embed_layer": AaPE} | TINY
    return timm.create_model(name, **sizes | options).eval()


def randomised(model: nn.Module) -> nn.Module:
    """timm starts some weights at zero: nothing may rest on that."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_create_model_as_it_stands():
    model = timm.create_model("vit_base_patch16_224", embed_layer=AaPE, img_size=(128, 1024), in_chans=1, depth=1)
    stem = model.patch_embed
    assert isinstance(stem, AaPE)
    assert (stem.img_size, stem.patch_size, stem.grid_size, stem.num_patches) == ((128, 1024), (16, 16), (8, 64), 512)
    assert model.pos_embed.shape == (1, 513, 768)
    assert model(torch.randn(1, 1, 128, 1024)).shape == (1, 1000)
    assert model.feature_info[0]["reduction"] == 16


def test_initial_values_survive():
    """timm initialises a model's inner Linear and Conv2d modules afresh, by name and by type, after building it."""
    for mode in ("", "jax", "moco"):
        check_initial_values(vit(weight_init=mode).patch_embed)
        model = vit(weight_init=mode)
        model.init_weights(mode)
        check_initial_values(model.patch_embed)


def check_initial_values(stem: AaPE) -> None:
    assert not stem.encoder.b1.any()
    assert stem.encoder.w2.std().item() == pytest.approx(0.02, rel=0.1)
    decay, frequency = torch.sigmoid(stem.encoder.b2).chunk(2)
    states = stem.num_states
    torch.testing.assert_close(decay, torch.full((states,), 0.5))
    torch.testing.assert_close(frequency, (torch.arange(states) + 0.5) / states)
    for weight in (stem.encoder.w1, stem.sblu.weight, stem.fusion.weight):
        limit = 1 / math.sqrt(weight[0].numel())
        assert limit / 2 < weight.abs().max() <= limit


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_relpos_small_patch16_224"])
def test_the_model_is_timms_but_for_the_stem(name):
    """Fusion at zero, everything randomised: the same logits as with timm's own PatchEmbed, at its own checkpoint."""
    plain = randomised(vit(name, embed_layer=PatchEmbed))
    model = vit(name)
    left = model.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {key.removeprefix("patch_embed.") for key in left.missing_keys} == {
        "encoder.w1", "encoder.b1", "encoder.w2", "encoder.b2", "sblu.weight", "fusion.weight",
    }  # fmt: skip
    x = torch.randn(2, 1, 32, 96)
    assert relative_error(model(x), plain(x)) > 1e-4
    nn.init.zeros_(model.patch_embed.fusion.weight)
    assert relative_error(model(x), plain(x)) <= 1e-5


@pytest.mark.parametrize("pad", [False, True])
def test_dynamic_image_size(pad):
    """Positions are resampled to each input's token grid, as with timm's stem."""
    plain = randomised(vit(embed_layer=PatchEmbed, dynamic_img_size=True, dynamic_img_pad=pad))
    model = vit(dynamic_img_size=True, dynamic_img_pad=pad)
    model.load_state_dict(plain.state_dict(), strict=False)
    nn.init.zeros_(model.patch_embed.fusion.weight)
    for size in ((32, 96), (48, 64)) + pad * ((40, 70),):
        x = torch.randn(2, 1, *size)
        assert model.patch_embed(x).shape == plain.patch_embed(x).shape
        assert relative_error(model(x), plain(x)) <= 1e-5


def test_padding_where_the_size_is_fixed():
    """grid_size counts the padded tokens, so that the positions fit; timm's own stem does not."""
    model = vit(img_size=(40, 70), dynamic_img_pad=True)
    assert model.patch_embed.grid_size == (3, 5)
    assert model(torch.randn(1, 1, 40, 70)).shape == (1, 5)


def test_set_input_size():
    plain = randomised(vit(embed_layer=PatchEmbed))
    model = vit()
    model.load_state_dict(plain.state_dict(), strict=False)
    nn.init.zeros_(model.patch_embed.fusion.weight)
    for each in (plain, model):
        each.set_input_size(img_size=(64, 48))
    assert model.patch_embed.grid_size == (4, 3)
    x = torch.randn(2, 1, 64, 48)
    assert relative_error(model(x), plain(x)) <= 1e-5
    model.set_input_size(img_size=(32, 32), patch_size=(16, 16))
    assert model.patch_embed.num_patches == 4


def test_intermediates():
    plain = randomised(vit(embed_layer=PatchEmbed))
    model = vit()
    model.load_state_dict(plain.state_dict(), strict=False)
    nn.init.zeros_(model.patch_embed.fusion.weight)
    x = torch.randn(2, 1, 32, 96)
    (final, maps), (want, wanted) = model.forward_intermediates(x), plain.forward_intermediates(x)
    assert relative_error(final, want) <= 1e-5
    assert [tuple(one.shape) for one in maps] == [(2, 32, 2, 6)] * 2
    for got, expected in zip(maps, wanted, strict=True):
        assert relative_error(got, expected) <= 1e-5


def test_features_only():
    model = vit(features_only=True, out_indices=(0, 1))
    assert [tuple(one.shape) for one in model(torch.randn(2, 1, 32, 96))] == [(2, 32, 2, 6)] * 2
    assert model.feature_info.reduction() == [16, 16]


def test_checkpoint_filter():
    """A checkpoint of another image size and with a flattened patch weight, as timm's filters take them."""
    source = randomised(vit(embed_layer=PatchEmbed, img_size=(48, 48)))
    state = source.state_dict()
    weight = state["patch_embed.proj.weight"]
    model = vit()
    filtered = checkpoint_filter_fn(state | {"patch_embed.proj.weight": weight.flatten(1)}, model)
    model.load_state_dict(filtered, strict=False)
    assert torch.equal(model.patch_embed.proj.weight, weight)
    assert torch.equal(model.patch_embed.proj.bias, state["patch_embed.proj.bias"])
    assert model.pos_embed.shape == (1, 13, 32)


@torch.no_grad()
def test_pretrained(tmp_path):
    """timm's own loading, of a local file; replacing after it keeps the output."""
    plain, x = randomised(vit(embed_layer=PatchEmbed)), torch.randn(2, 1, 32, 96)
    torch.save(plain.state_dict(), tmp_path / "vit.pth")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "vit.pth"), "num_classes": 5}}
    model = replace_stem(vit(embed_layer=PatchEmbed, **options))
    assert relative_error(model(x), plain(x)) <= 1e-5
    built = vit(pretrained_strict=False, **options)
    assert torch.equal(built.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    check_initial_values(built.patch_embed)


def test_options_go_through_a_partial():
    model = vit(embed_layer=partial(AaPE, num_states=8, kernel="bilateral", layout="TF"), img_size=(96, 32))
    assert (model.patch_embed.num_states, model.patch_embed.grid_size) == (8, (6, 2))
    assert model(torch.randn(1, 1, 96, 32)).shape == (1, 5)


@pytest.mark.parametrize("options", [{"pre_norm": True}, {"embed_norm_layer": nn.LayerNorm}, {"dtype": torch.float64}])
def test_stem_keywords(options):
    model = vit(**options)
    stem = model.patch_embed
    assert (stem.proj.bias is None) == ("pre_norm" in options)
    assert isinstance(stem.norm, nn.LayerNorm if "embed_norm_layer" in options else nn.Identity)
    x = torch.randn(1, 1, 32, 96, dtype=stem.proj.weight.dtype)
    assert model(x).shape == (1, 5)
    if "embed_norm_layer" in options:
        assert stem(x).mean(-1).abs().max() <= 1e-6


def test_layer_groups_and_weight_decay():
    """What timm's optimiser factory reads."""
    model = vit()
    for parameter in model.patch_embed.parameters():
        assert parameter.requires_grad
    assert re.match(model.group_matcher()["stem"], "patch_embed.fusion.weight")
    model.set_grad_checkpointing()
    model.train()(torch.randn(2, 1, 32, 96)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.patch_embed.parameters())
