"""The keys of the official YAML files (Vchitect/Latte, configs/), each with its counterpart here.

Pure data without imports, so that `--help` stays quick: `engine.config` hints at the new name of an official key,
`tools.convert_config` translates a whole file. Every key of the official configs of the four data sets is in exactly
one table; a key without a counterpart has the reason.
"""

from __future__ import annotations

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
