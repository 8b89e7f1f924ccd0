"""The whole command against the formulae on features computed here; ranks, cache, manifest, counts, sentences."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.catalog import Clip
from datasets.readers import VideoError
from engine.distributed import World
from evaluation import extract, measure, sources
from evaluation.detectors import DETECTORS, load_detector
from evaluation.distances import frechet_distance, frechet_from_moments, inception_score, kernel_distance
from sample.video_io import write_mp4
from tests.conftest import refuses
from tests.detector_stubs import StubInception, write_network, write_stub
from tests.fault_support import main_rank, on_two_ranks
from tools import calc_metrics_for_dataset as command

Sets = tuple[Path, Path, Path]


def moving(seed: int, frames: int, size: int = 24) -> np.ndarray:
    """A bright square that crosses noise: what is shown, and its order, matter."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 120, (frames, size, size, 3), dtype=np.uint8)
    start, step = rng.integers(0, size, 2), rng.integers(1, 4)
    for frame in range(frames):
        y, x = (start + step * frame) % (size - 6)
        video[frame, y : y + 6, x : x + 6] = rng.integers(180, 256, 3)
    return video


def arrays(folder: Path, seeds: range, frames: Callable[[int], int] = lambda number: 16, size: int = 24) -> Path:
    folder.mkdir(parents=True)
    for number, seed in enumerate(seeds):
        np.save(folder / f"{number:06d}.npy", moving(seed, frames(number), size))
    return folder


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detectors")
    for name in ("i3d", "c3d"):
        write_stub(name, folder).rename(folder / DETECTORS[name].file)
    torch.manual_seed(0)
    # with its 2048 features a value would take a minute
    write_network(StubInception(48, 24), folder / DETECTORS["inception"].file)
    return folder


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_narrow(monkeypatch)


def expect_narrow(patch: pytest.MonkeyPatch) -> None:
    for name, dims in (("inception", 48), ("inception_is", 24)):
        patch.setitem(DETECTORS, name, replace(DETECTORS[name], dims=dims))


@pytest.fixture
def sets(tmp_path: Path, detectors: Path) -> Sets:
    """20 real clips of 16 to 35 frames, 20 fakes of 16, and the detectors."""
    real = arrays(tmp_path / "real", range(20), lambda number: 16 + number)
    return real, arrays(tmp_path / "fake", range(100, 120)), detectors


def arguments(real: Path | None, fake: Path, detectors: Path, metrics: str, *more: str) -> list[str]:
    sources = [*(["--real_data_path", str(real)] if real else []), "--fake_data_path", str(fake)]
    out = fake.parent / "out" / "result.json"
    base = ["--protocol", "stylegan-v", "--workers", "0", "--verbose", "0", "--cache_dir", str(fake.parent / "cache")]
    return [*sources, "--metrics", metrics, *base, "--detector_dir", str(detectors), "--out", str(out), *more]


def run(*given: Any) -> dict[str, Any]:
    argv = arguments(*given)
    assert command.main(argv) == 0
    return json.loads(Path(argv[argv.index("--out") + 1]).read_text())


def features(folder: Path, name: str, detectors: Path, offsets: Callable[[int], int] = lambda _: 0) -> torch.Tensor:
    """Without anything of the tool: load, cut, call."""
    files = enumerate(sorted(folder.glob("*.npy")))
    clips = [np.load(path)[offsets(number) : offsets(number) + 16] for number, path in files]
    video = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).contiguous()
    network = load_detector(name, detectors / DETECTORS[name].file)
    return network(video.flatten(0, 1) if network.input == "frame" else video)


def windows(folder: Path, side: str = "real") -> dict[str, list[int]]:
    """File -> [offset, stride, frames], of the manifest."""
    manifest = json.loads((folder / "out" / "result.manifest.json").read_text())
    (entry,) = [each for each in manifest["entries"] if each["side"] == side]
    return {line[0]: line[1:] for line in entry["windows"]}


def test_clip_metrics_are_the_formulae_on_the_clips_of_the_manifest(sets: Sets) -> None:
    result = run(*sets, "fvd2048_16f,kvd2048_16f,isv2048_ucf")
    used = windows(sets[0].parent)
    assert len(used) == 20 and all(rest[1:] == [1, 16] for rest in used.values())
    assert all(0 <= rest[0] <= int(name[:6]) for name, rest in used.items()) and any(rest[0] for rest in used.values())
    real = features(sets[0], "i3d", sets[2], lambda number: used[f"{number:06d}.npy"][0])
    fake = features(sets[1], "i3d", sets[2])
    classes = features(sets[1], "c3d", sets[2])
    found = {name: entry["value"] for name, entry in result["metrics"].items()}
    assert found["fvd2048_16f"] == pytest.approx(frechet_distance(real, fake), rel=1e-6)
    assert found["kvd2048_16f"] == pytest.approx(kernel_distance(real, fake)[0], rel=1e-6)
    assert found["isv2048_ucf"] == pytest.approx(inception_score(classes, shuffle_seed=42)[0], rel=1e-6)
    assert found["fvd2048_16f"] > 0 and found["isv2048_ucf"] > 1
    other = run(*sets, "fvd2048_16f", "--divisor", "n-1")["metrics"]["fvd2048_16f"]
    moments = [extract.Moments(400).add(each) for each in (real, fake)]
    assert other["value"] == pytest.approx(frechet_from_moments(*moments, "n-1"), rel=1e-5)
    assert other["value"] > found["fvd2048_16f"] and any("divisor=n-1" in each for each in other["warnings"])


@pytest.mark.parametrize("max_rows", [50_000, 10])
def test_frame_metrics_see_all_real_frames_and_the_first_fakes(
    sets: Sets, monkeypatch: pytest.MonkeyPatch, max_rows: int
) -> None:
    monkeypatch.setattr(measure, "MAX_ROWS", max_rows)
    monkeypatch.setattr(extract, "MOMENT_ROWS", 64)
    names = "fid100_full,kid100_full,fid100,is101,is50k"
    result = run(*sets, names, "--report", "clip,frame", "--checks", "floor")
    network = load_detector("inception", sets[2] / DETECTORS["inception"].file)
    every = [np.load(path) for path in sorted(sets[0].glob("*.npy"))]
    real = network(torch.from_numpy(np.concatenate(every)).permute(0, 3, 1, 2))
    fake = features(sets[1], "inception", sets[2])[:100]
    entry = result["metrics"]["fid100_full"]
    assert (entry["counts"]["real"]["used"], entry["counts"]["fake"]["used"]) == (sum(range(16, 36)), 100)
    assert entry["value"] == pytest.approx(frechet_distance(real, fake), rel=1e-6)
    assert entry["floor_counts"][0] + entry["floor_counts"][1] == len(real) and entry["floor"] > 0
    assert result["metrics"]["fid100"]["value"] == pytest.approx(frechet_distance(real[:100], fake), rel=1e-6)
    kid, (mean, spread) = result["metrics"]["kid100_full"], kernel_distance(real, fake, subset_size=max_rows)
    assert abs(kid["value"] - mean) <= (1e-5 * abs(mean) if max_rows > len(real) else 3 * spread)
    assert kid["counts"] == entry["counts"]
    classes = features(sets[1], "inception_is", sets[2])
    for name, used in (("is101", 101), ("is50k", 320)):  # 101 do not divide, and are split at floor(10.1 i)
        score = result["metrics"][name]
        assert score["value"] == pytest.approx(inception_score(classes[:used])[0], rel=1e-9)
        assert score["counts"]["fake"]["used"] == used
        said = " | ".join(score["warnings"])
        assert ("320 fake frames were used; 50000 are requested" in said) == (name == "is50k")
    assert "shuffled" not in entry  # frames by themselves have no order
    assert set(entry["by_frame"]) <= {str(place) for place in range(16)}


def test_equal_sets_are_at_zero_below_floor_and_shuffled(sets: Sets) -> None:
    entry = run(sets[1], sets[1] / ".." / "fake", sets[2], "fvd2048_16f")["metrics"]["fvd2048_16f"]
    assert abs(entry["value"]) < 1e-6 * entry["floor"] and entry["shuffled"] > 0 and entry["floor_counts"] == [10, 10]
    said = " | ".join(entry["warnings"])
    assert "real and fake clips are the same, '" in said and "the value says nothing about samples" in said
    assert "not the known i3d_torchscript.pt: its SHA-256 differs" in said


def test_length_reports_see_the_first_frames(tmp_path: Path, detectors: Path) -> None:
    real, fake = (arrays(tmp_path / str(seed), range(seed, seed + 6), lambda _: 64) for seed in (0, 50))
    entry = run(real, fake, detectors, "fvd16_64f", "--report", "clip,frame")["metrics"]["fvd16_64f"]
    assert list(entry["by_length"]) == ["16", "32", "64"] and entry["by_length"]["64"] == entry["value"]
    first = [features(each, "i3d", detectors) for each in (real, fake)]
    assert entry["by_length"]["16"] == pytest.approx(frechet_distance(*first), rel=1e-6)


def test_short_and_unreadable_clips_are_dropped_named_and_replaced(tmp_path: Path, detectors: Path) -> None:
    real = arrays(tmp_path / "real", range(12), lambda number: 15 if number in (0, 3, 8) else 16)
    (real / "000001.npy").write_bytes(b"broken")
    fake = arrays(tmp_path / "fake", range(50, 56))
    entry = run(real, fake, detectors, "fvd6_16f")["metrics"]["fvd6_16f"]
    assert list(windows(tmp_path)) == [f"{number:06d}.npy" for number in (2, 4, 5, 6, 7, 9)]
    counts = entry["counts"]["real"]
    assert (counts["used"], counts["too_short"], counts["unreadable"], counts["clips_found"]) == (6, 3, 1, 12)
    dropped, short = entry["dropped"]["real"], [f"{number:06d}.npy" for number in (0, 3, 8)]
    assert dropped["unreadable"] == {"000001.npy": "is cut off, or not a readable .npy array of numbers"}
    assert dropped["too_short"] == dict.fromkeys(short, "has 15 frames, a clip needs 16")
    assert any("1 unreadable, 3 too short" in warning for warning in entry["warnings"])


def test_all_clips_once_and_unequal_counts_are_warned_of(tmp_path: Path, detectors: Path) -> None:
    real, fake = arrays(tmp_path / "real", range(9)), arrays(tmp_path / "fake", range(50, 57))
    found = run(real, fake, detectors, "fvd2048_16f,kvd2048_16f")["metrics"]
    for metric, entry in found.items():
        assert [entry["counts"][side]["used"] for side in ("real", "fake")] == [9, 7]
        said = " | ".join(entry["warnings"])
        assert "9 real and 7 fake clips were used; 2048 are requested" in said and "9 real against 7 fake" in said
        for part in ("fewer than 2048 clips: the small number raises the value", "7 items for 400 features"):
            assert (part in said) == (metric == "fvd2048_16f")  # KVD has no such bias
        assert entry["floor_counts"] == [4, 4]
        assert ("; the floor, 4 real ones against 4 others, is " in said) == (metric == "fvd2048_16f")
        assert "are the same" not in said
    few = run(real, arrays(tmp_path / "few", range(60, 63)), detectors, "fvd2048_16f")["metrics"]["fvd2048_16f"]
    assert few["floor_counts"] == [3, 3]  # as many as there are fakes, not half of the real clips
    two = [arrays(tmp_path / f"two{seed}", range(seed, seed + 2)) for seed in (0, 50)]
    entry = run(*two, detectors, "fvd2048_16f")["metrics"]["fvd2048_16f"]
    assert 0 < entry["value"] < 100 and "floor" not in entry  # halves of one clip have no covariance


def test_latte_draws_the_clips_and_stylegan_v_does_not(tmp_path: Path, detectors: Path) -> None:
    real = arrays(tmp_path / "real", range(30), lambda _: 48)
    fake = arrays(tmp_path / "fake", range(50, 80))
    taken = []
    for more in (["--protocol", "latte"], ["--protocol", "latte"], ["--protocol", "latte", "--seeds", "5"], []):
        entry = run(real, fake, detectors, "fvd8_16f", *more)["metrics"]["fvd8_16f"]
        taken.append((list(windows(tmp_path)), list(windows(tmp_path, "fake"))))
        stride = 3 if more else 1
        assert all(rest[1:] == [stride, 16] for rest in windows(tmp_path).values())
        assert entry["protocol"]["real_stride"] == stride and entry["protocol"]["fake_stride"] == 1
    first = [f"{number:06d}.npy" for number in range(8)]
    assert taken[0] == taken[1] != taken[2]
    assert first not in taken[0] and taken[3] == (first, first)


def test_seeds_move_the_real_clips_and_give_a_deviation(sets: Sets) -> None:
    entry = run(*sets, "fvd2048_16f", "--seeds", "0,1,2")["metrics"]["fvd2048_16f"]
    assert len(set(entry["values"])) == 3
    assert entry["value"] == pytest.approx(np.mean(entry["values"]))
    assert entry["std"] == pytest.approx(np.std(entry["values"], ddof=1))
    alone = run(*sets, "fvd2048_16f", "--seeds", "1")["metrics"]["fvd2048_16f"]
    assert alone["values"] == entry["values"][1:2] and alone["std"] is None
    still = run(*sets, "fid100_full", "--num_runs", "3")["metrics"]["fid100_full"]
    assert still["protocol"]["seeds"] == [0] and still["std"] is None  # nothing is drawn: one run says all


def test_what_nothing_is_drawn_of_is_read_once(sets: Sets, extracted: list[str]) -> None:
    """`latte` draws, but only where there is more than is asked for: not of 510 real and 320 fake frames."""
    latte = ["--protocol", "latte", "--seeds", "0,1,2"]
    found = run(*sets, "fid50k_full,kid50k_full,is50k", *latte)["metrics"]
    for entry in found.values():
        assert len(entry["values"]) == 1 and entry["std"] is None and entry["protocol"]["seeds"] == [0]
    assert extracted == ["real", "fake", "fake"]  # FID and KID share; IS has another detector
    other = run(*sets, "fid50k_full", *latte, "--seeds", "7")["metrics"]["fid50k_full"]
    assert other["values"] == found["fid50k_full"]["values"] and extracted[3:] == ["fake"]
    # fakes are drawn where fewer are asked for, not taken of those that were read whole; the real side is read once
    extracted.clear()
    some = run(*sets, "fid50k_full,fid100_full", *latte, "--use_cache", "0")["metrics"]["fid100_full"]
    assert len(set(some["values"])) == 3 and some["counts"]["fake"]["used"] == 100
    assert extracted == ["real", "fake", "fake", "fake", "fake"]
    # and so they are with the list of what was read
    manifest = sets[0].parent / "kept.json"
    shutil.copy(sets[0].parent / "out" / "result.manifest.json", manifest)
    np.save(sets[0] / "000000000.npy", moving(999, 40))
    again = run(*sets, "fid50k_full,fid100_full", *latte, "--manifest", str(manifest))["metrics"]
    assert again["fid100_full"]["values"] == some["values"]
    assert again["fid50k_full"]["values"] == found["fid50k_full"]["values"]


def test_counts_and_warnings_are_those_of_all_seeds(tmp_path: Path, detectors: Path) -> None:
    """2 of 5 clips are drawn: the broken one, and the short one, in some draws only."""
    real = arrays(tmp_path / "real", range(5), lambda number: 15 if number == 1 else 48)
    (real / "000003.npy").write_bytes(b"broken")
    fake = arrays(tmp_path / "fake", range(50, 53))
    found = (run(real, fake, detectors, "fvd2_16f", "--protocol", "latte", "--seeds", seeds)
             for seeds in ("0", "1", "2", "3", "4", "5", "0,1,2,3,4,5"))  # fmt: skip
    *alone, every = (each["metrics"]["fvd2_16f"] for each in found)
    counts = [(each["counts"]["real"]["too_short"], each["counts"]["real"]["unreadable"]) for each in alone]
    assert len({sum(each) for each in counts}) > 1  # or these seeds tell nothing
    assert (every["counts"]["real"]["too_short"], every["counts"]["real"]["unreadable"]) == (1, 1)
    assert every["values"] == [value for each in alone for value in each["values"]]
    assert any("1 unreadable, 1 too short" in warning for warning in every["warnings"])


def test_a_clip_that_can_be_read_in_part_is_used_and_told(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one of the two parts in which the 35 frames of the last clip are read something is broken."""
    original = sources.read_frames

    def failing(reader: Any, clip: Any, indices: list[int]) -> torch.Tensor:
        if clip.name == "000019.npy" and indices[0] > 0:
            raise VideoError(clip.path, "broken behind")
        return original(reader, clip, indices)

    monkeypatch.setattr(sources, "read_frames", failing)
    entry = run(*sets, "fid100_full")["metrics"]["fid100_full"]
    counts, dropped = entry["counts"]["real"], entry["dropped"]["real"]
    assert (counts["used"], counts["clips_used"], counts["unreadable"], counts["cut_off"]) == (510 - 3, 20, 0, 1)
    assert dropped["unreadable"] == {} and dropped["cut_off"] == {"000019.npy": "used in part: broken behind"}
    assert any("1 real files are cut off or damaged" in warning for warning in entry["warnings"])


def test_a_sample_of_a_stream_is_fair_and_belongs_together() -> None:
    """Item i of 40 is kept in the share 10/40, wherever it stands; its row, number and clip go together."""
    source = sources.Source("root", [Clip(path=name, name=name, size=1) for name in "abcd"])
    runs, seen = 600, np.zeros(40)
    for seed in range(runs):
        gather = extract.Gathered(source, keep=True)
        gather.sampling = np.random.default_rng(seed)
        windows = [sources.Window(clip, 0, 1, 10) for clip in range(4)]
        gather.summarise(windows, 10, [extract.Moments(1), extract.Moments(1)])
        for window in windows:
            values = torch.arange(10.0).view(10, 1) + 10 * window.clip
            gather.take([extract.Reading(window.clip, window, size=(8, 8))], {"plain": values})
        found = gather.finish()
        assert found.rows["plain"].shape == (10, 1) and found.count == 40
        assert found.kept is not None and found.kept.tolist() == found.rows["plain"].flatten().tolist()
        assert found.clips().tolist() == [int(value) // 10 for value in found.rows["plain"].flatten()]
        seen[found.kept.numpy()] += 1
    assert sum(moments.mean.item() * moments.count for moments in found.moments) == sum(range(40))
    expected = runs / 4
    assert ((seen - expected) ** 2 / (expected * 0.75)).sum() < 75  # chi square of 39 degrees: 1 in 2,000 is larger


def test_a_manifest_reads_the_same_clips_again(sets: Sets) -> None:
    given = (*sets, "fvd2048_16f", "--seeds")
    first = run(*given, "3")
    manifest = sets[0].parent / "kept.json"
    shutil.copy(sets[0].parent / "out" / "result.manifest.json", manifest)
    np.save(sets[0] / "000000000.npy", moving(999, 40))  # would be among the first
    again, other = run(*given, "3", "--manifest", str(manifest)), run(*given, "3")
    values = [each["metrics"]["fvd2048_16f"]["value"] for each in (first, again, other)]
    assert values[0] == values[1] != values[2]
    refuses("holds no real clips for these settings", run, *given, "4", "--manifest", str(manifest))
    (sets[0] / "000004.npy").unlink()
    refuses(r"'000004\.npy' is not in '.*real'", run, *given, "3", "--manifest", str(manifest))


def evaluate_on_rank(world: World, argv: list[str]) -> str:
    """Returns what one of two ranks prints."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        expect_narrow(patch)
        assert main_rank(world, command.main, [argv, argv]) == 0
    return shown.getvalue()


@pytest.mark.dist
def test_two_ranks_equal_one_in_every_bit(tmp_path: Path, detectors: Path) -> None:
    """21 and 19 clips, one broken, some short: the calls do not divide evenly, and in the last round one has none."""
    real = arrays(tmp_path / "real", range(21), lambda number: 15 if number in (2, 9) else 16 + number)
    (real / "000005.npy").write_bytes(b"broken")
    fake = arrays(tmp_path / "fake", range(100, 119))
    metrics = "fvd18_16f,kvd18_16f,fid100_full,is100,isv18_ucf"
    more = ("--use_cache", "0", "--workers", "1", "--device", "cpu")
    alone = run(real, fake, detectors, metrics, *more)
    file = tmp_path / "found.json"
    argv = arguments(real, fake, detectors, metrics, *more, "--out", str(file))
    shown = on_two_ranks(tmp_path, evaluate_on_rank, argv)
    assert shown[0].count("fvd18_16f  ") == 1 and not shown[1]  # one table
    both = json.loads(file.read_text())
    assert (alone["world_size"], both["world_size"]) == (1, 2)
    assert both["metrics"] == alone["metrics"]
    assert both["metrics"]["fvd18_16f"]["counts"]["real"]["used"] == 18


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the root of every source that is read."""
    roots: list[str] = []
    original = extract.Extractor.extract

    def noting(self: extract.Extractor, source: Any, *rest: Any) -> extract.FeatureSet:
        roots.append(Path(source.root).name)
        return original(self, source, *rest)

    monkeypatch.setattr(extract.Extractor, "extract", noting)
    return roots


def test_the_cache_knows_content(sets: Sets, extracted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again for the same bytes; not for other bytes of the same size and time, names, seeds or detectors."""
    monkeypatch.setattr(measure, "MAX_ROWS", 10)  # moments are kept of frames
    metrics = "fvd2048_16f,fid100_full"

    def values(*more: str) -> list[float]:
        extracted.clear()
        return [entry["value"] for entry in run(*sets, metrics, *more)["metrics"].values()]

    first = values()
    assert extracted == ["real", "fake", "real", "fake"]
    assert values() == first and extracted == ["fake", "fake"]  # fakes are never kept
    assert values("--use_cache", "0") == first and len(extracted) == 4
    changed = sets[0] / "000007.npy"
    stat, content = changed.stat(), bytearray(changed.read_bytes())
    content[128:2000] = bytes(1872)
    changed.write_bytes(bytes(content))
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert values() != first and extracted == ["real", "fake", "real", "fake"]
    values()
    assert extracted == ["fake", "fake"]
    threads = torch.get_num_threads()
    values("--threads", str(threads + 1))
    assert len(extracted) == 4  # another number of threads moves the last bits
    torch.set_num_threads(threads)
    changed.rename(sets[0] / "000099.npy")
    values()
    assert len(extracted) == 4
    values("--seeds", "1")
    assert extracted == ["real", "fake", "fake"]  # frames are not drawn, so the seed is nothing to them
    values("--detector", str(sets[2] / DETECTORS["i3d"].file))
    assert extracted == ["fake", "fake"]
    assert not [path for path in (sets[0].parent / "cache").iterdir() if path.suffix not in (".json", ".safetensors")]


def test_a_damaged_cache_is_made_anew(sets: Sets, extracted: list[str]) -> None:
    first = run(*sets, "fvd2048_16f")["metrics"]
    (record,) = (sets[0].parent / "cache").glob("*.json")
    stored = record.with_suffix(".safetensors")
    for file, change in (
        (stored, lambda content: content[:-4]),
        (record, lambda content: content[:-100]),
        (record, lambda content: content.replace(b'"version": 2', b'"version": 1')),
    ):
        file.write_bytes(change(file.read_bytes()))
        extracted.clear()
        assert run(*sets, "fvd2048_16f")["metrics"] == first and extracted == ["real", "fake"]


def test_table_and_result_file(sets: Sets, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--report", "clip,frame", "--seeds", "0,1")
    result = run(*sets, "fvd2048_16f,fid50k_full,isv2048_ucf", *flags)
    shown = capsys.readouterr().out
    assert all("/" in line for line in shown.splitlines() if len(line) > 80)  # a path is never broken
    assert "protocol  stylegan-v; real split: train" in shown and "warning: " in shown
    assert all(each["sha256"] in shown and len(each["sha256"]) == 64 for each in result["detectors"].values())
    assert result["command"][0] == "tools.calc_metrics_for_dataset" and result["versions"]["torch"] == torch.__version__
    assert {"numpy", "av", "pillow"} < result["versions"].keys()
    keys = "name split num_real num_fake frames real_stride fake_stride real_offset selection crop resolution divisor"
    protocol = result["metrics"]["fvd2048_16f"]["protocol"]
    assert {*keys.split(), "seeds", "real_storage", "fake_storage"} <= protocol.keys()


def test_lossy_fakes_and_a_test_split_are_warned_of(tmp_path: Path, detectors: Path) -> None:
    real = arrays(tmp_path / "sky" / "test", range(4))
    for number in range(4):
        write_mp4(tmp_path / "fake" / f"{number}.mp4", moving(number, 16))
    said = " | ".join(run(real, tmp_path / "fake", detectors, "fvd4_16f")["warnings"])
    assert "does not look like the training split" in said and "the fakes are video files" in said
    said = " | ".join(run(real, tmp_path / "fake", detectors, "fvd4_16f", "--split", "test")["warnings"])
    assert "does not look like" not in said


def test_results_without_a_name_get_one_that_is_free(
    sets: Sets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sets[0].parent)
    real = arrays(Path("long"), range(9), lambda _: 48)
    for job in ("run.v1", "run.v2"):
        shutil.copytree(sets[1], Path(job) / "lossless")
    more = ["--dataset", "ffs", "--protocol", "latte", "--resolution", "24"]
    for job in ("run.v1", "run.v1", "run.v2"):
        argv = arguments(real, Path(job) / "lossless", sets[2], "fvd8_16f", *more)
        del argv[argv.index("--out") : argv.index("--out") + 2]
        assert command.main(argv) == 0
    made = {path.name: path for path in Path("results/metrics").iterdir() if "manifest" not in path.name}
    last = "run.v2-lossless-latte-ffs.json"
    assert set(made) == {"run.v1-lossless-latte-ffs.json", "run.v1-lossless-latte-ffs-2.json", last}
    assert f"results/metrics/{last}" in capsys.readouterr().out
    assert json.loads(made[last].read_text())["sources"]["real"]["path"] == "long"  # as it was given


def test_official_flags_and_a_read_only_cache(sets: Sets) -> None:
    (sets[0].parent / "cache").write_text("a file")
    official = ["--mirror", "1", "--gpus", "1", "--resolution", "24", "--verbose", "0", "--use_cache"]
    for use_cache in "10":
        assert run(*sets, "fvd2048_16f", *official, use_cache)["metrics"]["fvd2048_16f"]["value"] > 0


def test_a_strangers_file_is_not_overwritten(sets: Sets) -> None:
    out = sets[0].parent / "out" / "result.json"
    out.parent.mkdir()
    out.write_text('{"mine": 1}')
    refuses(r"result\.json exists and is not a result of this tool", run, *sets, "fvd2048_16f")
    assert out.read_text() == '{"mine": 1}'


def test_mistakes_are_one_sentence(sets: Sets) -> None:
    i3d = str(sets[2] / DETECTORS["i3d"].file)
    for flags, sentence in (
        (["--metrics", "fvd"], "did you mean 'fvd2048_16f'"),
        (["--metrics", "none"], "--metrics is empty"),
        (["--metrics", "fid50k,fvd64_16f", "--mirror", "1"], "--mirror 1 adds mirrored real frames to fid50k, which"),
        (["--protocol", "tats"], "--protocol: 'tats' is unknown"),
        (["--dataset", "kinetics"], "--dataset: 'kinetics' is unknown, use one of ffs, sky"),
        (["--checks", "flor"], "--checks: 'flor' is unknown, use floor, shuffle"),
        (["--report", "video"], "--report: 'video' is unknown, use clip, frame"),
        (["--gpus", "4"], "--gpus 4: start that many processes with python -m engine.elastic --nproc_per_node=4"),
        (["--num_runs", "2", "--seeds", "0,1"], "give only one of them"),
        (["--detector", "i4d=x.pt"], "there is no detector 'i4d'"),
        (["--detector", "i3d=gone.pt"], "there is no detector file gone.pt; nothing is downloaded"),
        (["--detector", f"{i3d}@{64 * '0'}"], "is not opened: its SHA-256 is [0-9a-f]{64}, but 0000"),
        (["--manifest", "gone.json"], "--manifest: there is no file 'gone.json'"),
        (["--manifest", i3d], "is not a manifest that this tool wrote"),
        (["--resolution", "0"], "--resolution is 0, but must be at least 1"),
    ):
        refuses(sentence, run, *sets, "fvd2048_16f", *flags)


def test_mistakes_of_the_data(sets: Sets, tmp_path: Path, extracted: list[str]) -> None:
    real, fake, _ = sets
    short = arrays(tmp_path / "short", range(3), lambda _: 15)
    large = arrays(tmp_path / "large", range(3))
    np.save(large / "000003.npy", moving(0, 16, size=32))
    other = arrays(tmp_path / "other", range(3), size=32)
    half = arrays(tmp_path / "half", range(2))
    (half / "000001.npy").write_bytes(b"broken")
    for sides, metric, sentence in (
        ((None, fake), "fvd2048_16f", "--real_data_path is missing: fvd2048_16f compares with real data"),
        ((short, fake), "fvd2048_16f", "none of the 3 clips in '.*short' can be used: 000000.npy: has 15 frames"),
        ((large, fake), "fvd2048_16f", "differ in size .24x24 and 32x32.: give --resolution"),
        ((other, fake), "fvd2048_16f", "the real ones 32x32 and the fake ones 24x24: give --resolution"),
        ((real, fake), "fvd2048_8f", "i3d takes clips of 10 or more frames, not 8"),
        ((real, fake), "fvd2048_16f,fvd2048_64f", "none of the 20 clips in '.*real' can be used: .*, a clip needs 64"),
        ((half, half), "fvd2048_16f", "half' has 1 clip that can be used, but fvd2048_16f needs 2 or more"),
        ((None, other), "isv2048_ucf", "other' has 3 clips that can be used, but isv2048_ucf needs 10 or more"),
        ((tmp_path / "gone", fake), "fvd2048_16f", "--real_data_path: there is no folder '.*gone'"),
    ):
        extracted.clear()
        refuses(sentence, run, *sides, sets[2], metric)
        assert not extracted or metric == "fvd2048_8f" or sides[0] in (large, half)  # nothing is computed for it
    run(large, other, sets[2], "fvd2048_16f", "--resolution", "24")
    assert "fvd2048_16f" not in run(None, fake, sets[2], "isv2048_ucf")["metrics"]  # needs no real data
