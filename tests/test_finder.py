"""Stems found by structure: models of the surface that published ones have, with random weights."""

import pytest
import torch
from known_models import ROWS, timm_vit
from libraries import timm, transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

from aape_kernels import AaPE, replace_stem, revert_stem
from aape_kernels.finder import KNOWN, find, layout_of
from aape_kernels.surgery import AaPEConv2d


class Stem(nn.Module):
    """A patch embedding, under the name that its convolution has there."""

    def __init__(self, name="proj", patch=16, stride=None, channels=1):
        super().__init__()
        self.add_module(name, nn.Conv2d(channels, 8, patch, stride or patch))


def model(name, path="patch_embed", base=nn.Module, stem=None, **parts):
    """A class called `name`, with a stem at `path` and some layers."""
    made = type(name, (base,), {})()
    made.blocks = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])
    for part, module in {path: stem or Stem(), **parts}.items():
        made.add_module(part, module)
    return made


TIMM = timm.models.vision_transformer.VisionTransformer


def of_timm(name, size):
    made = type(name, (TIMM,), {})(img_size=size, in_chans=1, depth=1, embed_dim=32, num_heads=2)
    made.patch_embed = type("PatchEmbed", (Stem,), {})()
    return made


def hf(config, kind, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **options}))


IMAGES = {
    "ViTMAE": ("ViTMAEConfig", "ViTMAEModel", {}),
    "DeiT": ("DeiTConfig", "DeiTModel", {}),
    "BEiT": ("BeitConfig", "BeitModel", {}),
    "Data2VecVision": ("Data2VecVisionConfig", "Data2VecVisionModel", {}),
    "DINOv2": ("Dinov2Config", "Dinov2Model", {}),
    "DINOv3": ("DINOv3ViTConfig", "DINOv3ViTModel", {}),
    "SigLIP": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    "CLIP": ("CLIPVisionConfig", "CLIPVisionModel", {}),
}
# name: what builds it, the path of its stem, its layout
FOUND = {
    "M2D": (lambda: of_timm("M2DEncoderViT", (80, 608)), "patch_embed.proj", "FT"),
    "M2D, portable": (
        lambda: model("PortableM2D", "backbone", stem=model("LocalViT")),
        "backbone.patch_embed.proj",
        "FT",
    ),
    "CED": (lambda: model("CedModel", stem=type("AudioPatchEmbed", (Stem,), {})()), "patch_embed.proj", "FT"),
    "Dasheng": (lambda: model("DashengModel", stem=Stem(patch=(64, 4))), "patch_embed.proj", "FT"),
    "OpenBEATs": (
        lambda: model("BeatsEncoder", "patch_embedding", stem=nn.Conv2d(1, 8, 16, 16)),
        "patch_embedding",
        "TF",
    ),
    "MAEST": (lambda: model("MAEST", stem=Stem(stride=10)), "patch_embed.proj", "FT"),
    "ASiT": (lambda: model("ASiT"), "patch_embed.proj", "FT"),
    "CAV-MAE": (
        lambda: model("CAVMAE", "patch_embed_v", stem=Stem(channels=3), patch_embed_a=Stem()),
        "patch_embed_a.proj",
        "FT",
    ),
    "LAION-CLAP": (
        lambda: model("HTSAT_Swin_Transformer", stem=Stem(patch=4), mel_conv2d=nn.Conv2d(1, 8, (4, 12), (4, 12))),
        "patch_embed.proj",
        "FT",
    ),
    "ClapAudio": (
        lambda: hf(
            "ClapAudioConfig", "ClapAudioModel", depths=[1], num_attention_heads=[2], patch_embeds_hidden_size=32
        ),
        "audio_encoder.patch_embed.proj",
        "FT",
    ),
    "open_clip": (
        lambda: in_library("open_clip", model("VisionTransformer", "conv1", stem=nn.Conv2d(3, 8, 16, 16))),
        "conv1",
        "FT",
    ),
    **{
        name: (lambda row=row: hf(row[0], row[1], image_size=64, patch_size=16, **row[2]), None, "FT")
        for name, row in IMAGES.items()
    },
}


def in_library(name, made):
    type(made).__module__ = f"{name}.transformer"
    return made


@pytest.mark.parametrize("name", FOUND)
def test_published_models_are_found(name):
    build, path, layout = FOUND[name]
    made = build()
    where = find(made)
    assert where == path or (path is None and isinstance(made.get_submodule(where), nn.Conv2d))
    assert layout_of(made, where) == layout
    if name != "BEiT":  # of which the class token is made elsewhere
        assert made.get_submodule(where).in_channels in (1, 3)
    replace_stem(made, num_states=4)
    stem = made.get_submodule(where)
    assert (type(stem), stem.layout) == (AaPEConv2d, layout)
    revert_stem(made)
    assert type(made.get_submodule(where)) is nn.Conv2d


def test_every_row_of_the_table_is_tested():
    found = set()
    for build in [row.build for row in ROWS.values()] + [row[0] for row in FOUND.values()]:
        made = build()
        found |= {known for known in KNOWN for module in made.modules() if known.holds(module)}
    assert found == set(KNOWN)


REFUSED = {
    "ConvNeXt": (lambda: timm.create_model("convnext_atto", in_chans=1), "it has others beside 'stem.0' "),
    "hybrid": (lambda: timm.create_model("vit_tiny_r_s16_p8_224", in_chans=1), "others|none of its|cut patches"),
    "ResNet": (lambda: timm.create_model("resnet18", in_chans=1), "it has others beside|cut patches"),
    "vit-pytorch": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 8)),
        "it has no nn.Conv2d: its patches are cut by other means",
    ),
    "pointwise": (lambda: nn.Sequential(nn.Conv2d(1, 8, 1)), r"none of its nn.Conv2d cuts patches \(there are: '0'\)"),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(8, 8, 16, 16, groups=8)), "none of its nn.Conv2d cuts patches"),
    "two": (
        lambda: nn.ModuleDict({"a": Stem(), "b": Stem()}),
        r"several cut patches, name one by path: 'a.proj', 'b.proj'",
    ),
    "itself": (lambda: nn.Conv2d(1, 8, 16, 16), "it is itself a convolution: AaPE.from_conv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_with_a_reason_of_one_line(name):
    build, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason) as error:
        replace_stem(build())
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("size", [(1024, 128), (208, 80)])
def test_sizes_that_are_higher_than_wide_need_a_layout(size):
    made = timm_vit(img_size=size)
    with pytest.raises(ValueError, match=rf"layout: .*, built for \({size[0]}, {size[1]}\), feeds 'patch_embed.proj'"):
        replace_stem(made)
    with pytest.raises(ValueError, match="layout: expected one of FT, TF"):
        replace_stem(made, path="patch_embed")
    assert replace_stem(made, layout="TF").patch_embed.proj.layout == "TF"
    vit = hf("ViTConfig", "ViTModel", image_size=list(size), patch_size=16)
    with pytest.raises(ValueError, match="layout: expected one of FT, TF"):
        replace_stem(vit)


def test_what_structure_finds_and_no_row_knows_needs_a_layout():
    made = model("Mine")
    with pytest.raises(ValueError, match=r"nothing tells in which order Mine feeds 'patch_embed\.proj'"):
        replace_stem(made)
    assert replace_stem(made, layout="TF").patch_embed.proj.layout == "TF"


CHANGES = {
    "weight-norm": lambda stem: parametrizations.weight_norm(stem),
    "pruning": lambda stem: prune.l1_unstructured(stem, "weight", 0.5),
    "pruned-bias": lambda stem: prune.random_unstructured(stem, "bias", 0.5),
    "old-spectral-norm": lambda stem: nn.utils.spectral_norm(stem),
}


@pytest.mark.parametrize("change", CHANGES)
def test_reverting_a_changed_stem_is_refused(change):
    made = replace_stem(model("Mine"), layout="FT", num_states=4)
    CHANGES[change](made.patch_embed.proj)
    with pytest.raises(ValueError, match=r"a stem whose \w+ is a parameter, without weight_norm, pruning or the like"):
        revert_stem(made)
    assert isinstance(made.patch_embed.proj, AaPE)


def test_reverting_what_was_pruned_for_good():
    made = replace_stem(model("Mine"), layout="FT", num_states=4)
    prune.l1_unstructured(made.patch_embed.proj, "weight", 0.5)
    prune.remove(made.patch_embed.proj, "weight")
    weight = made.patch_embed.proj.weight
    assert revert_stem(made).patch_embed.proj.weight is weight


@pytest.mark.parametrize("on_the_stem", [False, True])
def test_adapters_of_peft(on_the_stem):
    """LoRA beside AaPE's own parts, which are trained and saved whole; or on the stem's convolution itself."""
    peft = pytest.importorskip("peft")
    made = replace_stem(timm_vit(), num_states=4)
    nn.init.normal_(made.patch_embed.proj.fusion.weight)
    x = torch.randn(1, 1, 32, 64)
    before = made(x)
    parts = None if on_the_stem else [f"proj.{part}" for part in ("encoder", "sblu", "fusion")]
    targets = ["qkv", *["patch_embed.proj"] * on_the_stem]
    adapted = peft.get_peft_model(made, peft.LoraConfig(target_modules=targets, modules_to_save=parts))
    assert torch.allclose(adapted(x), before, atol=1e-4)
    adapted(x).square().sum().backward()
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    wanted = ("lora_B",) if on_the_stem else ("encoder", "sblu", "fusion")
    for part in wanted:
        found = [value for name, value in trained.items() if part in name and "patch_embed" in name]
        assert found
        assert all(value.grad.any() for value in found), part
    saved = peft.get_peft_model_state_dict(adapted)
    assert all(any(part in name and "patch_embed" in name for name in saved) for part in wanted)


def test_transformers_trainer_decays_what_the_stem_does_not_name():
    """The recipe of docs/models.md: its rule goes by names, ours by `no_weight_decay`."""
    import transformers.trainer

    made = replace_stem(ROWS["hf-ast"].build(), num_states=4)
    exempt = {
        f"{path}.{name}"
        for path, module in made.named_modules()
        if isinstance(module, AaPE)
        for name in module.no_weight_decay()
    }

    class Trainer(transformers.trainer.Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    assert {name.rpartition(".")[2] for name in exempt} == {"bias", "b1", "b2"}
    names = Trainer.get_decay_parameter_names(object.__new__(Trainer), made)
    assert names
    assert not set(names) & exempt
