"""Selection of clips and frames: hand-counted folders, brute force, and the pitfalls of other tools."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.catalog import Clip
from engine.distributed import World
from evaluation.extract import CALL_FRAMES, Extractor
from evaluation.manifest import window_to_json, windows_from_json
from evaluation.protocols import SideRules, build_protocol, parse_metric
from evaluation.sources import (
    TASK_FRAMES,
    Source,
    TooShort,
    Window,
    choose_window,
    digest_content,
    group_frames,
    read_task,
    select_frame_windows,
    shuffle_frames,
)
from tests.conftest import refuses


def rules(metric: str = "fvd2048_16f", protocol: str = "stylegan-v", side: str = "real", seed: int = 0) -> SideRules:
    return build_protocol(protocol).side(side, parse_metric(metric), seed)


def array(file: Path, frames: int, start: int = 0) -> Path:
    """A sample array whose frame i is of grey level start + i."""
    file.parent.mkdir(parents=True, exist_ok=True)
    levels = np.arange(start, start + frames, dtype=np.uint8)
    np.save(file, np.tile(levels[:, None, None, None], (1, 8, 8, 3)))
    return file


def test_every_offset_is_drawn() -> None:
    """0 to L - n s + s - 1, both ends; the largest one ends on frame L - 1."""
    for metric, protocol, side, length, last_offset in (
        ("fvd2048_16f", "stylegan-v", "real", 20, 4),
        ("fvd2048_16f", "stylegan-v", "fake", 20, 0),
        ("fvd2048_128f_subsample8f", "stylegan-v", "real", 130, 9),
        ("fvd2048_16f", "latte", "real", 50, 4),
        ("fvd2048_16f", "latte", "fake", 50, 0),
    ):
        own = rules(metric, protocol, side)
        drawn = Counter(choose_window(own, Clip("x", f"clip{i}", 0), 0, length).offset for i in range(600))
        assert sorted(drawn) == list(range(last_offset + 1))
        assert min(drawn.values()) > 600 / (last_offset + 1) / 2  # evenly
        ends = {choose_window(own, Clip("x", f"clip{i}", 0), 0, length).indices[-1] for i in range(600)}
        assert max(ends) == (length - 1 if side == "real" else own.frames - 1)
        choose_window(own, Clip("x", "x", 0), 0, own.span)
        with pytest.raises(TooShort, match=f"has {own.span - 1} frames, a clip needs {own.span}"):
            choose_window(own, Clip("x", "x", 0), 0, own.span - 1)


def test_offsets_depend_on_seed_and_clip_alone() -> None:
    names = [f"clip{i}" for i in range(50)]

    def offsets(seed: int, names: list[str]) -> dict[str, int]:
        own = rules(seed=seed)
        return {name: choose_window(own, Clip("x", name, 0), 0, 400).offset for name in names}

    assert offsets(0, names) == offsets(0, names[::-1])  # neither the place nor the neighbours
    assert offsets(0, names) != offsets(1, names)
    assert len(set(offsets(0, names).values())) > 30


def test_first_in_the_order_of_names_folder_by_folder(tmp_path: Path) -> None:
    """`clip` and `clip-1` are siblings: as text, 'clip-1/b' would come before 'clip/a'."""
    for name in ("clip-1/000001", "clip/000000", "clip/000003", "clip/sub/000002", "b/000009"):
        array(tmp_path / f"{name}.npy", 16)
    source = Source.find(str(tmp_path), "--real_data_path")
    names = ["b/000009", "clip/000000", "clip/000003", "clip/sub/000002", "clip-1/000001"]
    assert [clip.name.removesuffix(".npy") for clip in source.clips] == names
    assert source.order(rules()) == [0, 1, 2, 3, 4]


def test_random_selection_is_seeded_and_complete(tmp_path: Path) -> None:
    for number in range(40):
        array(tmp_path / f"{number:06d}.npy", 16)
    source = Source.find(str(tmp_path), "--real_data_path")
    every = rules(protocol="latte")
    orders = [source.order(replace(every, count=39, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(40)) for order in orders)  # the last steps in where one cannot be used
    assert orders[0] != sorted(orders[0])
    assert source.order(replace(every, count=40)) == source.order(replace(every, count=None)) == list(range(40))


def test_arrays_are_the_samples_and_videos_beside_them_their_copies(tmp_path: Path) -> None:
    array(tmp_path / "arrays" / "000000.npy", 16)
    (tmp_path / "0000.mp4").write_bytes(b"for people")
    source = Source.find(str(tmp_path), "--fake_data_path")
    assert [clip.name for clip in source.clips] == ["arrays/000000.npy"]
    assert source.skipped == {"*.mp4": 1}


def test_nothing_to_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    np.save(tmp_path / "statistics.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"--fake_data_path: '.*' holds no video, .*\(found: 1 \*\.npy, 1 \*\.txt\)"):
        Source.find(str(tmp_path), "--fake_data_path")
    refuses("--real_data_path: there is no folder", Source.find, str(tmp_path / "gone"), "--real_data_path")
    refuses("is a file, not a folder of clips", Source.find, str(tmp_path / "notes.txt"), "--real_data_path")


def test_pictures_of_every_mode_become_rgb(tmp_path: Path) -> None:
    """Grey is repeated, transparency dropped, a palette looked up: 16 frames in each of the modes."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images = {
        "grey": Image.fromarray(colours[..., 0]),
        "alpha": Image.fromarray(np.dstack([colours, np.full((8, 8), 9, np.uint8)])),
        "palette": Image.fromarray(colours).quantize(64),
        "rgb": Image.fromarray(colours),
    }
    for name, image in images.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for frame in range(16):
            image.save(tmp_path / "set" / name / f"{frame:03d}.png")
    source = Source.find(str(tmp_path / "set"), "--real_data_path")
    readings = read_task(source, rules(), [(place, None) for place in range(4)])
    shown = {source.clips[each.clip].name: each.frames[5].permute(1, 2, 0).numpy() for each in readings}  # type: ignore[index]
    assert np.array_equal(shown["grey"], np.repeat(colours[..., :1], 3, axis=2))
    assert np.array_equal(shown["alpha"], colours) and np.array_equal(shown["rgb"], colours)
    assert np.array_equal(shown["palette"], np.asarray(images["palette"].convert("RGB")))


def test_the_frames_are_those_of_the_window(tmp_path: Path) -> None:
    array(tmp_path / "000000.npy", 100)
    source = Source.find(str(tmp_path), "--real_data_path")
    readings = read_task(source, rules(), [(0, Window(0, 5, 6, 16)), (0, Window(0, 0, 1, 3))])
    levels = [each.frames[:, 0, 0, 0].tolist() for each in readings]  # type: ignore[index]
    assert levels == [list(range(5, 101, 6)), [0, 1, 2]]
    beyond = read_task(source, rules(), [(0, Window(0, 90, 1, 16))])
    assert beyond[0].reason == "has 100 frames, but frame 105 is requested"


def test_shuffled_frames_are_the_same_frames_in_another_order() -> None:
    frames = torch.arange(16).view(16, 1, 1, 1)
    one, same, other = (shuffle_frames(frames, Clip("x", name, 0)).flatten() for name in ("a", "a", "b"))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.tolist() != sorted(one.tolist()) and sorted(one.tolist()) == list(range(16))


@pytest.mark.parametrize(("count", "expected"), [(None, 60), (50_000, 60), (33, 33), (7, 7)])
@pytest.mark.parametrize("protocol", ["stylegan-v", "latte"])
def test_frames_are_taken_once_each(protocol: str, count: int | None, expected: int) -> None:
    lengths = [16, 0, 3, 40, 1]
    own = replace(rules("fid50k_full", protocol, "fake"), count=count)
    windows = select_frame_windows(lengths, own)
    taken = [(window.clip, index) for window in windows for index in window.indices]
    everything = [(clip, index) for clip, length in enumerate(lengths) for index in range(length)]
    assert len(taken) == len(set(taken)) == expected and set(taken) <= set(everything)
    assert taken == sorted(taken)
    if protocol == "stylegan-v":
        assert taken == everything[:expected]
    elif expected < 60:
        assert taken != everything[:expected]
    tasks = group_frames(windows)
    assert [window for task in tasks for _, window in task] == windows
    assert all(len({place for place, _ in task}) == 1 for task in tasks)
    assert all(sum(window.frames for _, window in task if window) <= TASK_FRAMES for task in tasks)


class Counting:
    """A detector that notes the clips of its calls."""

    input, dims = "clip", 1

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls.append(pixels[:, 0, 0, 0, 0].tolist())
        return pixels[:, 0, 0, 0, :1].float()


def test_calls_are_fixed_blocks_of_clips(tmp_path: Path) -> None:
    """128 frames each; a clip that cannot be used is replaced in a later call."""
    for number in range(19):
        array(tmp_path / f"{number:06d}.npy", 15 if number == 3 else 16, start=number)
    source = Source.find(str(tmp_path), "--fake_data_path")
    detector = Counting()
    found = Extractor(World(), workers=0).extract(source, rules("fvd17_16f", side="fake"), detector)  # type: ignore[arg-type]
    assert CALL_FRAMES == 8 * 16
    assert detector.calls == [[0, 1, 2, 4, 5, 6, 7], [*range(8, 16)], [16], [17]]
    assert found.rows["plain"].flatten().tolist() == [each for each in range(18) if each != 3]


def test_the_digest_is_of_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for frame in range(20):
        Image.new("RGB", (8, 8), (frame, 0, 0)).save(tmp_path / "a" / f"{frame:03d}.png")
    clip = Source.find(str(tmp_path), "x").clips[0]
    window = [Window(0, 2, 1, 16)]
    before = digest_content(clip, window), digest_content(clip, None)
    Image.new("RGB", (8, 8), (99, 0, 0)).save(tmp_path / "a" / "019.png")  # not in the window
    assert digest_content(clip, window) == before[0] and digest_content(clip, None) != before[1]
    Image.new("RGB", (8, 8), (99, 0, 0)).save(tmp_path / "a" / "017.png")
    assert digest_content(clip, window) != before[0]


def test_windows_come_back_from_json(tmp_path: Path) -> None:
    array(tmp_path / "000000.npy", 100)
    source = Source.find(str(tmp_path), "x")
    windows = [Window(0, 5, 6, 16), Window(0, 0, 1, 1)]
    lines = [window_to_json(window, source) for window in windows]
    assert lines == [["000000.npy", 5, 6, 16], ["000000.npy", 0, 1, 1]]
    assert windows_from_json(lines, source, "list") == windows
    for line, reason in (
        (["gone.npy", 0, 1, 16], "list: 'gone.npy' is not in"),
        (["000000.npy", -1, 1, 16], "list: line 1 is not"),
        (["000000.npy", 0, 0, 16], "list: line 1 is not"),
        (["000000.npy", 0, 1, "16"], "list: line 1 is not"),
        ("000000.npy", "list: line 1 is not"),
    ):
        refuses(reason, windows_from_json, [line], source, "list")
