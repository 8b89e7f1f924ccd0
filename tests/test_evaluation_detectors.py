"""Detectors: files that are what they say, called as the real ones are; and the command that checks one."""

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets.readers import open_video
from evaluation import torchscript
from evaluation.detectors import DETECTORS, DetectorFile, load_detector
from evaluation.distances import frechet_distance
from evaluation.stand_in import StandIn
from tests.conftest import refuses
from tests.detector_stubs import STUBS, write_network, write_stub
from tools import check_detector

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_imagenet_dequantized.pth"
CLIPS = SHARED / "media" / "clips" / "asl"
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason="../shared/weights is absent")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stubs")
    return {name: write_stub(name, folder) for name in STUBS}


@pytest.fixture(scope="module")
def random_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileNetV2 with random weights that let its input through, as torchvision saves it."""
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    network = mobilenet_v2()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 1)
            module.running_var.uniform_(0.02, 0.1)
    file = tmp_path_factory.mktemp("backbone") / "mobilenet_v2.pth"
    torch.save(network.state_dict(), file)
    return file


def plain(name: str) -> nn.Module:
    """The stub before it became TorchScript, with the weights of its file."""
    torch.manual_seed(0)
    return STUBS[name]().eval()


def test_every_metric_has_a_detector_and_a_name_of_its_own() -> None:
    served = {metric for spec in DETECTORS.values() if not spec.stand_in for metric in spec.metrics}
    assert served == {"fvd", "kvd", "fid", "kid", "is", "isv"}
    assert all(name == spec.name and "://" in spec.origin for name, spec in DETECTORS.items())
    # torchvision's file names end in the first digits of their hash
    assert DETECTORS["mobilenet_v2"].file.endswith(f"-{str(DETECTORS['mobilenet_v2'].sha256)[:8]}.pth")


def test_i3d_sees_channels_first_minus_one_to_one_whole_frames(stubs: dict[str, Path]) -> None:
    clips = noise(2, 12, 3, 40, 56)
    pixels = torch.stack([clip.permute(1, 0, 2, 3) for clip in clips]).float() / 127.5 - 1
    pixels = nn.functional.interpolate(pixels, (12, 32, 32), mode="trilinear", align_corners=False)
    network = plain("i3d")
    with torch.no_grad():
        expected = network.out(torch.tanh(network.conv(pixels)).mean((2, 3, 4)))
    detector = load_detector("i3d", stubs["i3d"])
    found = detector(clips)
    assert (detector.name, detector.dims, detector.input) == ("i3d", 400, "clip")
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, detector(clips.flip(1)), atol=1e-6)


def test_inception_gives_features_or_probabilities_without_the_bias(stubs: dict[str, Path]) -> None:
    frames, network = noise(3, 3, 24, 32), plain("inception")
    with torch.no_grad():
        features = torch.relu(network.conv(frames.float() / 128 - 1)).mean((2, 3))
        expected = (features @ network.output.weight.T).softmax(1)
    assert torch.allclose(load_detector("inception", stubs["inception"])(frames), features, atol=1e-6)
    found = load_detector("inception_is", stubs["inception"])(frames)
    assert found.shape == (3, 1008) and torch.allclose(found, expected, atol=1e-7)


def test_c3d_takes_16_frames_and_no_arguments(stubs: dict[str, Path]) -> None:
    detector, clips = load_detector("c3d", stubs["c3d"]), noise(2, 16, 3, 20, 20)
    with torch.no_grad():
        expected = plain("c3d")(clips.transpose(1, 2))
    assert torch.allclose(detector(clips), expected, atol=1e-7)


def test_wrong_pixels_are_refused(stubs: dict[str, Path]) -> None:
    """Above all those of 0 to 1, which give tiny distances and no error."""
    for name, pixels, sentence in (
        ("i3d", torch.rand(1, 16, 3, 8, 8), r"uint8 pixels of 0 to 255.* not torch\.float32"),
        ("i3d", noise(1, 9, 3, 8, 8), "clips of 10 or more frames, not 9"),
        ("i3d", noise(1, 3, 16, 8, 8), r"clips \(B, T, 3, H, W\), not \(1, 3, 16, 8, 8\)"),
        ("i3d", noise(0, 16, 3, 8, 8), r"not \(0, 16"),
        ("c3d", noise(1, 17, 3, 8, 8), "c3d takes clips of 16 frames, not 17"),
        ("inception", noise(2, 4, 8, 8), "inception takes"),
    ):
        refuses(sentence, load_detector(name, stubs[name]), pixels)


class Meddler(nn.Module):
    """Tells the settings that it runs under."""

    def forward(self, x: Tensor) -> Tensor:
        flags = [
            torch.get_float32_matmul_precision() == "highest",
            not torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.deterministic,
            not torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
            not torch._C._get_graph_executor_optimize(),
        ]
        return torch.tensor([flags], dtype=torch.float32).expand(len(x), -1)


def test_it_runs_in_full_precision_whatever_the_process_does(stubs: dict[str, Path]) -> None:
    detector = load_detector("i3d", stubs["i3d"])
    clips = noise(2, 16, 3, 32, 32)
    expected = detector(clips)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(5):  # TorchScript would rewrite its graphs after the first calls
                assert torch.equal(detector(clips), expected)
            detector.network = Meddler()
            assert detector.run(clips).tolist() == [[1] * 6] * 2
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


class CheckedI3D(nn.Module):
    """Gives zeros against ones the known value of the real I3D, or fails the check that is called `fault`."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if self.fault == "shape":
            return torch.zeros(x.shape[0], 1024)
        if self.fault == "same input twice":
            return torch.rand(x.shape[0], 400)
        if self.fault == "other input":
            return torch.ones(x.shape[0], 400)
        x = x.float()
        if self.fault == "alone, among others":  # as with batch norms that were left training
            return ((x - x.mean()) / x.std()).mean([1, 3, 4]).abs().mean(1, keepdim=True).expand(-1, 400).contiguous()
        squared = 569.2296 if x.shape[2] == 10 else 152.9175 if x.shape[2] == 16 else 151.2565
        level = x.mean([1, 2, 3, 4]) / 255 * 2 - 1 if rescale else x.mean([1, 2, 3, 4])
        features = torch.zeros(x.shape[0], 400, device=x.device)
        features[:, 0] = level * squared**0.5 / 2
        return features


def test_what_a_network_cannot_do_is_one_line(stubs: dict[str, Path], tmp_path: Path) -> None:
    i3d = load_detector("i3d", write_network(CheckedI3D("shape"), tmp_path / "a.pt"))
    refuses(r"a\.pt: i3d must give finite features \(2, 400\) .* gave shape \(2, 1024\)", i3d, noise(2, 16, 3, 8, 8))
    inception = load_detector("inception", stubs["inception"])
    refuses(r"inception\.pt: inception cannot take \(1, 3, 2, 2\): ", inception, noise(1, 3, 2, 2))


def test_a_hash_is_always_there_and_must_be_the_given_one(stubs: dict[str, Path]) -> None:
    digest = hashlib.sha256(stubs["i3d"].read_bytes()).hexdigest()
    assert load_detector("i3d", stubs["i3d"]).sha256 == digest
    assert load_detector("i3d", str(stubs["i3d"]), sha256=f" {digest.upper()} ").sha256 == digest
    wrong = hashlib.sha256(b"another").hexdigest()
    sentence = f"not opened: its SHA-256 is {digest}, but {wrong} is expected"
    refuses(sentence, load_detector, "i3d", stubs["i3d"], sha256=wrong)


def test_a_file_that_is_no_detector_is_one_sentence(stubs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    for spec, needed in ((None, "a TorchScript network, nor weights"), (DETECTORS["mobilenet_v2"], "weights")):
        sentence = rf"text\.pt is not {needed} for a stand-in: get one from .*"
        refuses(sentence, DetectorFile.read, tmp_path / "text.pt", spec=spec)
    sentence = r"text\.pt is not a TorchScript file, or not whole; .*: get it from https"
    refuses(sentence, load_detector, "i3d", tmp_path / "text.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    sentence = r"other\.pt is none of the detectors i3d, .*: it holds other weights"
    refuses(sentence, DetectorFile.read(tmp_path / "other.pt").kinds)
    torch.save({"features.0.0.weight": torch.ones(2)}, tmp_path / "part.pt")
    for file, message in (("other.pt", "it holds other weights"), ("part.pt", "torchvision's mobilenet_v2")):
        refuses(rf"{re.escape(file)} .*{message}", load_detector, "mobilenet_v2", tmp_path / file)
    refuses("is a TorchScript file, but weights are needed", load_detector, "mobilenet_v2", stubs["i3d"])


def test_a_missing_file_is_one_line_with_its_origin(tmp_path: Path) -> None:
    for name, spec in DETECTORS.items():
        refuses(rf"{tmp_path}/gone\.pt.*{re.escape(spec.origin)}", load_detector, name, tmp_path / "gone.pt")


@pytest.mark.parametrize(("name", "other"), [("i3d", "c3d"), ("i3d", "inception"), ("inception_is", "i3d")])
def test_another_detectors_file_is_refused_by_its_arguments(stubs: dict[str, Path], name: str, other: str) -> None:
    sentence = rf"is not {re.escape(DETECTORS[name].file)}, the detector {name}: its forward"
    refuses(sentence, load_detector, name, stubs[other])


def test_files_are_told_by_their_arguments(stubs: dict[str, Path], random_backbone: Path) -> None:
    expected = {
        stubs["i3d"]: ["i3d"],
        stubs["c3d"]: ["c3d"],
        stubs["inception"]: ["inception", "inception_is"],
        random_backbone: ["mobilenet_v2_clip", "mobilenet_v2", "mobilenet_v2_is"],
    }
    for file, names in expected.items():
        assert [spec.name for spec in DetectorFile.read(file).kinds()] == names


def test_a_large_file_is_not_read(stubs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript, "MAX_BYTES", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda *_: pytest.fail("read"))
    refuses("no detector is that large", load_detector, "i3d", stubs["i3d"])


def test_stand_in_is_torchvisions_network(random_backbone: Path) -> None:
    """On frames of its own size, where nothing is resized."""
    from torchvision.models import mobilenet_v2
    from torchvision.transforms.functional import normalize

    network = mobilenet_v2().eval()
    network.load_state_dict(torch.load(random_backbone, weights_only=True))  # noqa: TID251
    frames = noise(2, 3, 224, 224)
    pixels = normalize(frames / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        features, logits = network.features(pixels).mean((2, 3)), network(pixels)
        steps = network.features[:18](pixels).mean((2, 3))
    assert torch.allclose(load_detector("mobilenet_v2", random_backbone)(frames), features, atol=1e-4)
    assert not torch.allclose(features[0], features[1], atol=1e-2)
    assert torch.allclose(load_detector("mobilenet_v2_is", random_backbone)(frames), logits.softmax(1), atol=1e-7)
    found = load_detector("mobilenet_v2_clip", random_backbone)(frames[None])[0]
    expected = torch.cat([steps.mean(0), (steps[1] - steps[0]).abs()])
    assert torch.allclose(found, expected, atol=1e-3) and expected[:320].abs().max() > 10 > expected[320:].max() > 0.1


def test_stand_in_has_plain_relus_where_the_batch_norms_are_folded() -> None:
    """Quantised networks have; torchvision's own weights come with limits of 6."""
    from torchvision.models import mobilenet_v2

    weights = mobilenet_v2().state_dict()
    for folded, kind in ((True, nn.ReLU), (False, nn.ReLU6)):
        weights["features.0.1.running_mean"].fill_(0.0 if folded else 0.1)
        found = StandIn("frame", weights, Path("a.pth"))
        assert {type(each) for each in found.modules() if isinstance(each, nn.ReLU | nn.ReLU6)} == {kind}


@needs_weights
def test_stand_in_orders_real_clips_as_one_would() -> None:
    """Later frames of the same clips < the same frames in another order < blurred < noise."""
    detector, clips = load_detector("mobilenet_v2_clip", WEIGHTS), []
    for file in sorted(CLIPS.iterdir())[:4]:
        frames = torch.from_numpy(np.asarray(open_video(file).read(list(range(5, 35, 3))))).float()
        clips.append(nn.functional.interpolate(frames, (64, 64), mode="area").byte())
    real, later = torch.stack(clips)[:, :6], torch.stack(clips)[:, 1:7]
    small = nn.functional.avg_pool3d(real.float(), (1, 4, 4))
    others = {
        "later": later,
        "shuffled": real[:, [0, 4, 1, 5, 2, 3]],
        "blurred": nn.functional.interpolate(small, scale_factor=(1, 4, 4)).byte(),
        "noise": noise(*real.shape),
    }
    features = detector(real)
    value = {name: frechet_distance(features, detector(each)) for name, each in others.items()}
    assert abs(frechet_distance(features, features)) < 1e-6
    assert list(value.values()) == sorted(value.values()), value


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, list[str]]:
    code = check_detector.main([str(each) for each in arguments])
    return code, capsys.readouterr().out.splitlines()


def test_check_of_a_detector_that_gives_the_published_values(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write_network(CheckedI3D(), tmp_path / "i3d.pt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    code, lines = run(capsys, file, "--sha256", digest)
    assert code == 0 and lines[-1] == "7 of 7 checks hold (cpu)"
    assert lines[1] == f"sha256  {digest}" and lines[2] == "takes   x, rescale, resize, return_features"
    assert "ok    zeros against ones T=30 151.2565, published 151.2565 +- 1" in lines
    assert "ok    shape                   (3, 16, 3, 64, 64) uint8 -> (3, 400) float32" in lines


def test_check_of_a_detector_that_does_not(stubs: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    code, lines = run(capsys, stubs["i3d"])
    assert code == 1 and lines[-1] == "4 of 7 checks hold (cpu)"
    assert sum(line.startswith("FAIL  zeros against ones T=") for line in lines) == 3


@pytest.mark.parametrize(
    ("name", "kinds", "number"), [("c3d", ["c3d"], 5), ("inception", ["inception", "inception_is"], 9)]
)
def test_check_of_detectors_without_published_values(
    stubs: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    name: str, kinds: list[str], number: int,
) -> None:  # fmt: skip
    code, lines = run(capsys, stubs[name])
    assert code == 0 and lines[-1] == f"{number} of {number} checks hold (cpu)"
    notes = [f"note  no published value is known for {kind}" for kind in kinds]
    assert [line for line in lines if line.startswith("note")] == notes
    assert any("probabilities" in line for line in lines)
    digest = hashlib.sha256(stubs[name].read_bytes()).hexdigest()
    for kind in kinds:
        monkeypatch.setitem(DETECTORS, kind, dataclasses.replace(DETECTORS[kind], sha256=digest))
    code, lines = run(capsys, stubs[name], "--kind", kinds[0])
    assert code == 0 and lines[3] == f"known   this is {DETECTORS[kinds[0]].file}, SHA-256"
    assert not any("inception_is" in line for line in lines)


class ImprobableC3D(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean([1, 2, 3, 4])[:, None].expand(-1, 101).contiguous()


@pytest.mark.parametrize("fault", ["shape", "same input twice", "other input", "alone, among others", "probabilities"])
def test_check_sees(tmp_path: Path, capsys: pytest.CaptureFixture, fault: str) -> None:
    network = ImprobableC3D() if fault == "probabilities" else CheckedI3D(fault)
    code, lines = run(capsys, write_network(network, tmp_path / "a.pt"))
    assert code == 1 and any(line.startswith(f"FAIL  {fault}") for line in lines), lines


def test_check_of_nothing(stubs: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pth")
    for file, flags, sentence in (
        (tmp_path / "gone.pt", [], "there is no detector file"),
        (stubs["c3d"], ["--sha256", "00"], "is not opened: its SHA-256 is"),
        (stubs["c3d"], ["--kind", "i4d"], "--kind: there is no detector 'i4d'"),
        (stubs["c3d"], ["--kind", "i3d"], "is not i3d_torchscript.pt"),
        (stubs["c3d"], ["--device", "abacus"], "--device abacus"),
        (tmp_path / "other.pth", [], "is none of the detectors i3d"),
    ):
        refuses(sentence, check_detector.main, [str(file), *flags])


def test_long_check_leaves_pixels_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of 0 to 1, neither rescaled nor resized; covariances divided by one less than the number."""
    monkeypatch.setattr(check_detector, "NOISE_VIDEOS", 8)
    monkeypatch.setattr(check_detector, "NOISE_SIZE", 12)
    clips = [np.random.RandomState(seed).rand(8, 16, 12, 12, 3) for seed in (1, 2)]
    drawn = torch.cat(list(check_detector.draw_noise(2, frames=16)))
    assert torch.equal(drawn, torch.from_numpy(clips[1].astype(np.float32)).permute(0, 4, 1, 2, 3))
    level = [each.mean((1, 2, 3, 4)) * 152.9175**0.5 / 2 for each in clips]
    expected = (level[0].mean() - level[1].mean()) ** 2 + (level[0].std(ddof=1) - level[1].std(ddof=1)) ** 2
    detector = load_detector("i3d", write_network(CheckedI3D(), tmp_path / "i3d.pt"))
    assert check_detector.measure_noise(detector, 16) == pytest.approx(expected, rel=1e-3)
    (long,) = (each for each in check_detector.PUBLISHED["i3d"] if each.minutes)
    long = long._replace(value=expected, tolerance=0.1 * expected)
    monkeypatch.setitem(check_detector.PUBLISHED, "i3d", (long,))
    assert len(list(check_detector.run_checks(detector, long=False))) == 4
    assert list(check_detector.run_checks(detector, long=True))[-1][:2] == ("noise of two seeds T=16", True)
