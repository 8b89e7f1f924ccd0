"""Turn a folder of videos into a folder of folders of frames, one for each video, at any depth.

    python -m tools.convert_videos_to_frames -s UCF-101 -t UCF-101-frames --target_size 256

CLASS/video.avi becomes CLASS/video/000000.png and on. The flags are those of the official tool; new are --format
and --quality, the true quality of JPEG files (there it was 75, whatever was asked for). With --target_size it is,
as there, the largest centred square by Lanczos, but there is no size unless one is asked for. Names stay as they
are, '#' and spaces too, so that no two videos become one. Videos that cannot be read are named in
TARGET/report.json. A killed run goes on with the same command.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.text import printable
from datasets.catalog import Clip, find_clips
from datasets.readers import VIDEO_SUFFIXES, VideoError, open_video
from datasets.recipes import VIDEOS
from engine import cli
from tools.frames import LANCZOS, Form, Task, identity_of, output_names, unusable_name
from tools.output_folder import (
    LeftOut,
    OutputFolder,
    collect_settings,
    left_out_recorder,
    make_report,
    print_report,
    require_some,
)


def find_videos(source: Path, extension: str | None, left_out: LeftOut) -> list[Clip]:
    """The video files below `source`, sorted: those that end in `extension`, or in any of a video."""
    wanted = {f".{extension.lstrip('.').lower()}"} if extension else VIDEO_SUFFIXES
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder '{source}'")
    clips = sorted(
        find_clips(source, (VIDEOS,), left_out_recorder(left_out, source), wanted), key=lambda clip: clip.name
    )
    if not clips:
        raise ValueError(f"'{source}' holds no video files{f' that end in {min(wanted)}' if extension else ''}")
    return clips


def print_frame_rates(clips: Sequence[Clip]) -> None:
    """Counts the videos by frame rate, and names those that cannot be read."""
    rates: Counter[str] = Counter()
    for clip in clips:
        try:
            rates[f"{open_video(clip.path).fps:.6g}"] += 1
        except VideoError as error:
            print(f"{printable(clip.name)}: {error.reason}")
    for rate, videos in rates.most_common():
        print(f"{rate} frames a second: {videos} videos")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-s", "--source_dir", "--source_path", type=Path, required=True, metavar="SOURCE", help="folder of videos")
    add("-t", "--target_dir", "--target_path", type=Path, metavar="TARGET", help="folder to fill")
    add("--video_ext", metavar="EXT", help="only files with this extension (any video)")
    add("--target_size", type=int, metavar="N", help="centre crop and resize to N x N (unchanged)")
    add("--force_fps", type=int, metavar="N", help="pick frames by time, N a second (every frame)")
    add("--format", choices=("png", "jpeg"), default="png", help="of the frames (png)")
    add("--quality", type=int, metavar="Q", help="of JPEG files, 1 to 100 (95)")
    add("--num_workers", "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    add("--compute_fps_only", action="store_true", help="only print the frame rates")
    arguments = parser.parse_args(argv)
    if arguments.target_dir is None and not arguments.compute_fps_only:
        parser.error("-t/--target_dir is needed")
    if arguments.num_workers < 1:
        raise ValueError(f"--num_workers is {arguments.num_workers}, but must be at least 1")
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    left_out: LeftOut = []
    clips = find_videos(arguments.source_dir, arguments.video_ext, left_out)
    if arguments.compute_fps_only:
        print_frame_rates(clips)
        return
    form = Form(arguments.format, arguments.quality, arguments.target_size, LANCZOS, arguments.force_fps)
    settings = collect_settings("convert_videos_to_frames", arguments.source_dir, form, video_ext=arguments.video_ext)
    with OutputFolder(arguments.target_dir, arguments.source_dir, settings) as folder:
        good = [clip for clip in clips if not unusable_name(clip.name)]
        refused = [{"name": clip.name, "skipped": unusable_name(clip.name)} for clip in clips if clip not in good]
        names = output_names([clip.name for clip in good], form)
        tasks = [Task(clip.name, clip.path, out, identity_of(clip.path, clip.size)) for clip, out in zip(good, names)]
        records = folder.make(tasks, form, arguments.num_workers)
        require_some([*records, *refused], arguments.source_dir)
        report = make_report(settings, records, refused, left_out)
        folder.write_json("report.json", report)
    print_report(report, arguments.target_dir)


if __name__ == "__main__":
    cli.run(main)
