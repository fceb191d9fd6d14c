"""What the stems find in sound whose modulation is known, and which checkpoints they come from."""

import math

import pytest
import torch
from safetensors.torch import save_file

from aape_kernels import AaPE, sblu
from aape_kernels.plot import Heard, hear
from aape_kernels.reference import kernels
from aape_ssl.demo import command as demo
from aape_ssl.demo import picture, stems
from aape_ssl.sound import audio

HOP = audio.AUDIOSET128.hop
SPACING = (50 - 3.125) / 16  # Hz between the untrained stem's states


def modulated_noise(hz: float, depth: float = 0.8, seconds: float = 2.0) -> torch.Tensor:
    t = torch.arange(int(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    return 0.1 * torch.randn(len(t)) * (1 + depth * torch.sin(2 * math.pi * (hz * t + torch.rand(1))))


def untrained_responses(waveform: torch.Tensor) -> Heard:
    stem = stems.untrained_stem()
    x = demo.Viewer(stem, "", trained=False).prepare(audio.AUDIOSET128.log_mel(waveform))
    return hear(stem, x[None], HOP)


@pytest.mark.parametrize("hz", [5, 25])
@pytest.mark.parametrize("depth", [0.5, 0.8])
def test_modulation_rates_are_told_apart(hz, depth):
    for _ in range(5):
        found = stems.strongest_frequency(untrained_responses(modulated_noise(hz, depth)))
        assert abs(found - hz) < SPACING


def test_slow_modulation_does_not_hide_fast_modulation():
    """Level changes of 30 dB at 1 Hz, below the band, leave 25 Hz the strongest."""
    waveform = modulated_noise(25)
    t = torch.arange(len(waveform)) / audio.SAMPLE_RATE
    found = stems.strongest_frequency(untrained_responses(waveform * 10 ** (0.75 * torch.sin(2 * math.pi * t))))
    assert abs(found - 25) < SPACING


def test_untrained_stem_is_a_fixed_bank():
    """Every patch has the same states, evenly over the alias-prone band, whatever the input; and it is seeded."""
    responses = untrained_responses(modulated_noise(8))
    assert (responses.hz == responses.hz[0, 0]).all()
    assert (responses.decay == responses.decay[0, 0]).all()
    expected = 3.125 + SPACING * (torch.arange(16) + 0.5)
    torch.testing.assert_close(responses.hz[0, 0], expected, atol=1e-3, rtol=0)
    assert all(
        torch.equal(*pair) for pair in zip(*(stems.untrained_stem().parameters() for _ in range(2)), strict=True)
    )


def test_untrained_stem_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    stems.untrained_stem()
    assert torch.equal(before, torch.get_rng_state())


def test_strongest_frequency_follows_a_moving_state():
    """State 1 has the most energy, 3 at 10 Hz and 1 at 20 Hz: 12.5 Hz."""
    energy = torch.tensor([[[2.0, 3.0], [0.0, 1.0]]])
    hz = torch.tensor([[[40.0, 10.0], [40.0, 20.0]]])
    assert stems.strongest_frequency(Heard(energy, hz, torch.ones_like(hz))) == pytest.approx(12.5)
    silent = Heard(torch.zeros_like(energy), hz, torch.ones_like(hz))
    assert math.isfinite(stems.strongest_frequency(silent))


@pytest.mark.parametrize("kernel", ["quadrature", "bilateral"])
@pytest.mark.parametrize("window", [16, 7])
def test_kernels_are_what_sblu_applies(kernel, window):
    """Their product with any input is sblu's response to it."""
    decay, frequency = torch.rand(3) + 0.05, 3 * torch.rand(3)
    h = torch.stack(kernels(decay, frequency, window, kernel == "quadrature"), 1)
    x = torch.randn(1, 1, 1, window)
    every = (1, 1, 1, 3)
    y = sblu(x, decay.expand(every), frequency.expand(every), torch.ones(3, 1, 1), (1, window), kernel=kernel)
    torch.testing.assert_close(y[0, 0, 0], torch.einsum("spk,k->ps", h, x.flatten()))
    even, odd = (1, -1 if kernel == "quadrature" else 1)
    torch.testing.assert_close(h[:, 0], even * h[:, 0].flip(-1))
    torch.testing.assert_close(h[:, 1], odd * h[:, 1].flip(-1))


def test_distinct_states_are_a_half_width_apart():
    responses = untrained_responses(modulated_noise(20))
    states = picture.distinct_states(responses)
    assert 1 <= len(states) <= 4
    hz, width = responses.hz[0, 0, states], float(responses.decay[0, 0, 0]) / (2 * math.pi)
    assert hz[0] == responses.hz[0, 0, int(responses.energy.sum((0, 1)).argmax())]
    assert (hz[:, None] - hz).abs()[~torch.eye(len(hz), dtype=torch.bool)].min() >= width


# --- checkpoints ---


def trained(**options) -> AaPE:
    """A stem that looks trained: its encoder moves every state from patch to patch."""
    stem = AaPE(**options)
    with torch.no_grad():
        stem.encoder.w2.mul_(40)
    return stem


SIZES = [
    {},
    {"num_states": 5, "encoder_dim": 7, "embed_dim": 24, "bias": False},
    {"patch_size": (8, 12), "embed_dim": 24},
    {"features": "complex"},
    {"features": "magnitude", "embed_dim": 24},
]


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("prefix", ["", "patch_embed.", "student.encoder.patch_embed."])
def test_checkpoint_round_trip(tmp_path, options, prefix):
    stem = trained(**options)
    state = {"head.weight": torch.zeros(2, 2), **{prefix + name: value for name, value in stem.state_dict().items()}}
    torch.save({"epoch": 3, "state_dict": state} if prefix else stem.state_dict(), tmp_path / "stem.pt")
    loaded, found = stems.load_stem(tmp_path / "stem.pt")
    assert found == prefix
    x = torch.randn(1, 1, 128, 96)
    assert torch.equal(loaded(x), stem(x))


def test_checkpoint_of_time_first_layout(tmp_path):
    stem = trained(patch_size=(12, 8), embed_dim=24, layout="TF")
    torch.save(stem.state_dict(), tmp_path / "stem.pt")
    loaded, _ = stems.load_stem(tmp_path / "stem.pt")
    x = torch.randn(1, 1, 96, 128)
    time_major = stem(x).view(1, 8, 16, 24)
    torch.testing.assert_close(loaded(x.mT).view(1, 16, 8, 24), time_major.transpose(1, 2))


def test_checkpoint_in_half_precision(tmp_path):
    stem = trained(embed_dim=24).bfloat16()
    torch.save(stem.state_dict(), tmp_path / "stem.pt")
    loaded, _ = stems.load_stem(tmp_path / "stem.pt")
    assert loaded.proj.weight.dtype == torch.float32
    assert torch.equal(loaded.proj.weight, stem.proj.weight.float())


def test_safetensors_checkpoint(tmp_path):
    stem = trained(embed_dim=24)
    save_file(stem.state_dict(), tmp_path / "stem.safetensors")
    assert torch.equal(stems.load_stem(tmp_path / "stem.safetensors")[0].proj.weight, stem.proj.weight)


def test_a_trained_stem_sees_normalised_input(tmp_path):
    stem = trained(embed_dim=24)
    log_mel = audio.AUDIOSET128.log_mel(modulated_noise(8))
    assert torch.equal(demo.Viewer(stem, "", True).prepare(log_mel), (log_mel + 4.268) / (2 * 4.569))


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in AaPE(embed_dim=8).state_dict().items() if key != name}


BAD_CHECKPOINTS = {
    "missing": (None, "no such checkpoint"),
    "text": (b"hello, world\n", "the checkpoint cannot be read .it is none, or holds other things than tensors"),
    "empty": (b"", r"the checkpoint cannot be read \(EOFError"),
    "damaged": (b"PK\x03\x04" + bytes(60), "the checkpoint cannot be read"),
    "damaged, old": (b"\x80\x02no pickle", "the checkpoint cannot be read"),
    "a list": ([torch.zeros(2)], "expected a checkpoint, got a list"),
    "another model": ({"conv.weight": torch.zeros(3)}, "holds no AaPE stem"),
    "a part missing": (_without("encoder.w2"), "lacks encoder.w2"),
    "two channels": (AaPE(in_chans=2, embed_dim=8).state_dict(), "2 input channels"),
    "unequal sizes": ({**AaPE(embed_dim=8).state_dict(), "encoder.b2": torch.zeros(3)}, "do not fit"),
    "four planes": ({**AaPE(embed_dim=8).state_dict(), "fusion.weight": torch.zeros(8, 4, 16)}, "1 to 3 planes"),
    "wrong rank": ({**AaPE(embed_dim=8).state_dict(), "encoder.w1": torch.zeros(3)}, "do not fit"),
    "not finite": ({**_without("x"), "encoder.b2": torch.full((32,), math.nan)}, "not finite"),
    "code": (AaPE(embed_dim=8), "it is none, or holds other things than tensors and plain values"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint(tmp_path, case):
    content, reason = BAD_CHECKPOINTS[case]
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(stems.CheckpointError, match=reason) as caught:
        stems.load_stem(path)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_checkpoint(tmp_path):
    for name in ("folder", "folder.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(stems.CheckpointError, match=r"got a folder|cannot be read"):
            stems.load_stem(tmp_path / name)


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "stem.safetensors"
    path.write_bytes(bytes(100))
    with pytest.raises(stems.CheckpointError, match="the checkpoint cannot be read"):
        stems.load_stem(path)
