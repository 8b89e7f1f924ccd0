"""Keys of the official YAML files (Vchitect/Latte, configs/) and their translation to ours; removed keys and flags.

`engine.config` refuses an official key with a hint at its new name; `tools.convert config` translates a whole file.
Every key of the official configs for the four data sets is in RENAMED or DROPPED, every key of those for text in
TEXT_RENAMED or TEXT_DROPPED. Imports nothing slow, so `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.checks import require

# official key -> our dotted key
RENAMED: dict[str, str] = {
    # data
    "dataset": "data.name",
    "data_path": "data.path",
    "frame_data_txt": "data.frame_list",
    "num_frames": "data.num_frames",
    "video_length": "data.num_frames",
    "frame_interval": "data.frame_interval",
    "image_size": "data.image_size",
    "use_image_num": "data.num_images",
    "num_workers": "data.num_workers",
    # model and codec
    "model": "model.name",
    "num_classes": "model.num_classes",
    "learn_sigma": "model.learn_sigma",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "pretrained_model_path": "codec.path",
    # training
    "learning_rate": "optim.learning_rate",
    "lr_warmup_steps": "optim.warmup_steps",
    "clip_max_norm": "optim.max_grad_norm",
    "start_clip_iter": "optim.clip_start_step",
    "results_dir": "train.output_dir",
    "pretrained": "train.init_from",
    "max_train_steps": "train.max_steps",
    "local_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "ckpt_every": "train.checkpoint_every",
    "log_every": "train.log_every",
    "global_seed": "train.seed",
    "mixed_precision": "train.precision",
    "use_compile": "train.compile",
    # sampling
    "ckpt": "sample.ckpt",
    "save_img_path": "sample.save_video_path",
    "save_video_path": "sample.save_video_path",
    "seed": "sample.seed",
    "sample_method": "sample.method",
    "num_sampling_steps": "sample.steps",
    "cfg_scale": "sample.guidance_scale",
    "sample_names": "sample.labels",
    "use_fp16": "sample.precision",
    "per_proc_batch_size": "sample.batch_size",
    "num_fvd_samples": "sample.num_videos",
}

# official key -> why there is no such key here
DROPPED: dict[str, str] = {
    "resume_from_checkpoint": "train.resume=auto continues runs by itself; official files hold no optimizer state.",
    "extras": "model.num_classes alone says it: 0 is unconditional, more is class-conditional.",
    "fixed_spatial": "it froze every parameter there (nothing was left to train).",
    "attention_bias": "the attention projections always have their bias, as in the released weights.",
    "attention_mode": "train.attention names the kernel; all compute the same (docs/attention.md).",
    "enable_xformers_memory_efficient_attention": "attention uses PyTorch's fused kernels (docs/attention.md).",
    "frame_data_path": "joint training draws its images from the videos themselves (data.num_images).",
    "sequence_parallel_size": "a clip is never split over GPUs; train.parallel=fsdp spreads the weights.",
    "save_ceph": "no program read it; checkpoints go to train.output_dir.",
    "load_from_ceph": "data is read from data.path.",
    "negative_name": "the null label is the model's own.",
    "run_time": "no program for these data sets read it; the sample names are numbered.",
    "num_sample": "no program for these data sets read it; sample.num_videos is the number of videos.",
}

# official key -> conversion of its value; other values stay the same
VALUES: dict[str, Callable[[Any], Any]] = {
    "dataset": lambda name: str(name).removesuffix("_img"),
    "sample_method": lambda method: str(method).lower(),
    "use_fp16": lambda on: "fp16" if on else "fp32",
    "mixed_precision": lambda on: "bf16" if on else "tf32",
    "sample_names": lambda names: [str(name) for name in (names if isinstance(names, list) else [names])],
}

# official key -> remark in the translation report
REMARKS: dict[str, str] = {
    "pretrained_model_path": "the codec is its subfolder vae; text-to-video parts are not read.",
    "mixed_precision": "the official switch had no effect: it trained in tf32.",
    "gradient_accumulation_steps": "all step counts here are optimizer steps, not micro-batches.",
    "learning_rate": "the official programs always used 1e-4, whatever the file said.",
    "ckpt_every": "the two newest checkpoints are kept; train.keep_last=0 keeps all, as there.",
    "pretrained": "weights only; steps count from 0, not from the number in the name of the file.",
}

# official keys that have a counterpart but are not carried over -> the reason
OMITTED: dict[str, str] = {
    "frame_data_txt": "images are drawn from the videos; to use listed ones, put them below data.path and set "
    "data.frame_list.",
}

# the same for configs/t2x, whose keys sample/sample_t2x.py reads
TEXT_RENAMED: dict[str, str] = {
    **{
        key: key
        for key in (
            *("pretrained_model_path", "save_img_path", "text_prompt", "seed", "guidance_scale", "sample_method"),
            *("num_sampling_steps", "video_length", "image_size", "variance_type"),
            *("beta_start", "beta_end", "beta_schedule"),
            *("enable_temporal_attentions", "enable_vae_temporal_decoder"),
        )
    },
    "use_fp16": "precision",
    "use_compile": "compile",
}
TEXT_DROPPED: dict[str, str] = {
    "model": "there is one text network.",
    "run_time": "files are numbered by prompt.",
}
TEXT_VALUES = {"use_fp16": VALUES["use_fp16"]}

UNCONDITIONAL, CLASSES, TEXT = 1, 2, 78  # values of the official key `extras`


def is_text_config(official: Mapping[str, Any]) -> bool:
    """Returns whether these are the keys of an official text-to-video config."""
    return str(official.get("model", "")).startswith("LatteT2V")


def translate_config(official: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the sections of our config, and a report line for each official key.

    For a text-to-video config: the flat keys of configs/t2x. Raises: ValueError if `extras` is not supported.
    """
    if is_text_config(official):
        return _translate_keys(official, TEXT_RENAMED, TEXT_DROPPED, TEXT_VALUES, {}, {})
    extras, classes = official.get("extras"), official.get("num_classes")
    require(
        extras != TEXT,
        "extras: 78 (text) stopped the official training with an error; here text networks are trained with "
        "configs/t2x/t2v_train.yaml (docs/text_to_video.md).",
    )
    require(
        extras in (None, UNCONDITIONAL, CLASSES),
        f"extras: {extras} is unknown: 1 is unconditional, 2 is class-conditional.",
    )
    require(extras != CLASSES or bool(classes), f"extras: 2 is class-conditional: set num_classes, not {classes}.")
    flat, report = _translate_keys(official, RENAMED, DROPPED, VALUES, REMARKS, OMITTED)
    if extras == UNCONDITIONAL and flat.pop("model.num_classes", None) is not None:
        report.append("note      num_classes: left out, since extras is 1 (unconditional).")
    if "codec.path" in flat:
        flat["codec.subfolder"] = "vae"
    sections: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections, report


def _translate_keys(
    official: Mapping[str, Any],
    renamed: Mapping[str, str],
    dropped: Mapping[str, str],
    values: Mapping[str, Callable[[Any], Any]],
    remarks: Mapping[str, str],
    omitted: Mapping[str, str],
) -> tuple[dict[str, Any], list[str]]:
    """Returns values by our dotted keys, and a report line for each official key."""
    ours: dict[str, Any] = {}
    report = []
    for key, value in official.items():
        if key in dropped:
            report.append(f"dropped   {key}: {dropped[key]}")
        elif key not in renamed:
            report.append(f"unknown   {key}: not a key of the official configs; left out.")
        elif key in omitted:
            report.append(f"omitted   {key}: {omitted[key]}")
        elif value is None:
            report.append(f"empty     {key}: {renamed[key]} keeps its default.")
        else:
            ours[renamed[key]] = values.get(key, lambda same: same)(value)
            remark = f" ({remarks[key]})" if key in remarks else ""
            report.append(f"renamed   {key} -> {renamed[key]}: {ours[renamed[key]]}{remark}")
    return ours, report


# ---- removed keys, values and flags ----------------------------------------------------------------

# `section.key`, `section.key=value` or `--flag`, ours or official -> what to do instead
REMOVED: dict[str, str] = {
    "sample.cache": "the step cache was removed: sample.method=unipc with sample.steps=25 is as fast, more accurate.",
    "sample.modulation_mb": "modulations are now computed in every step: leave the key out.",
    "train.attention=triton": "that kernel is in benchmarks/candidates until it is timed on a GPU: use auto.",
    "--cache": "the step cache was removed: --method unipc --steps 25 is as fast and more accurate.",
    "--save_ceph": "this official flag wrote to the authors' own storage: --save_video_path names the folder.",
}


def drop_removed(values: Mapping[str, Any], source: str, *, saved: bool = False) -> dict[str, Any]:
    """Returns nested configuration values without the keys and values of `REMOVED`; ValueError if one is used.

    Args:
        saved: `values` were written by a run, perhaps of an older version: removed keys are ignored. A removed key
            that is off (null, 0 or false) is always ignored.
    """
    kept = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in values.items()}
    for section, keys in values.items():
        for key, value in keys.items() if isinstance(keys, Mapping) else ():
            name = f"{section}.{key}"
            sentence = REMOVED.get(name) or REMOVED.get(f"{name}={value}")
            if sentence and value and not saved:
                raise ValueError(f"{source}: {name}={value}: {sentence}")
            if sentence:
                del kept[section][key]
    return kept


def refuse_removed_flags(argv: Sequence[str]) -> None:
    """Raises ValueError for a flag in `REMOVED`."""
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag in REMOVED:
            raise ValueError(f"{flag}: {REMOVED[flag]}")
