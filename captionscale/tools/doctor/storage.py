"""Checks of shards, weights, the run's folder, and the disk for checkpoints."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision

from captionscale.data.shards import Split
from captionscale.data.storage import RemoteStorage, read_manifest
from captionscale.data.verification import check_sample
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.progress import format_duration
from captionscale.tools.doctor.plan import Plan
from captionscale.tools.doctor.report import CheckResult, failure, failure_of, ok, skipped, warning
from captionscale.tools.profiles import check_process_count, pluralize
from captionscale.train.checkpoint import find_latest, open_checkpoint
from captionscale.train.disk_space import check_disk_space, checkpoint_bytes
from captionscale.train.fingerprint import make_fingerprint, resume_conflicts
from captionscale.train.run_folder import LOG_FILE

_SAMPLES, _QUICK_SAMPLES = 200, 20
_PROBE_BYTES, _QUICK_PROBE_BYTES = 256 << 20, 32 << 20
_PROBE_S = 5.0


def shards(plan: Plan) -> Iterator[CheckResult]:
    """Check the shards: splits, captions, counts, and the checksums of some samples."""
    data, splits = plan.settings.data, read_manifest(plan.storage).splits
    if data.train_split == data.val_split:
        yield failure(
            f"data.train_split and data.val_split are both '{data.train_split}', so scores would be of"
            " training images",
            f"set data.val_split to another of {', '.join(sorted(splits))}",
        )
    counts = []
    for name in dict.fromkeys((data.train_split, data.val_split)):
        try:
            split = Split(plan.storage, name)
            split.require_captions("to train; pack the data set with its captions")
        except UserError as error:
            yield failure_of(error)
            continue
        counts.append(f"{name} {split.info.images:,} images with {split.info.captions:,} captions")
        if not isinstance(plan.storage, RemoteStorage):
            yield _check_samples(split, _QUICK_SAMPLES if plan.quick else _SAMPLES)
    if isinstance(plan.storage, RemoteStorage):
        yield skipped(f"samples of {plan.storage}: each shard's hash is checked when it is downloaded")
    if counts:
        yield ok(f"{plan.storage}: {', '.join(counts)}")


def _check_samples(split: Split, count: int) -> CheckResult:
    count = min(len(split), count)
    # Not seeded: each call checks other samples.
    items = np.random.default_rng().choice(len(split), count, replace=False)
    problems = [problem for item in items.tolist() for problem in check_sample(split, item, deep=False)]
    if not problems:
        return ok(f"{split.name}: checksums of {count:,} of {len(split):,} samples hold")
    more = f" (and {len(problems) - 1} more of {count} samples)" if len(problems) > 1 else ""
    first = failure_of(UserError(problems[0]))
    return failure(first.found + more, f"{first.cure}; captionscale verify {split.storage} names them all")


def batches(plan: Plan) -> Iterator[CheckResult]:
    """Check how the processes share a step's micro-batches."""
    train = plan.settings.train
    check_process_count(plan.settings, plan.world_size, plan.nodes, plan.profile)
    count = train.global_batch // train.micro_batch
    processes = pluralize(plan.world_size, "process")
    shares = f"{pluralize(count, 'micro-batch')} of {train.micro_batch} for {processes}"
    if rest := count % plan.world_size:
        idle = 1 - count / (plan.world_size * -(-count // plan.world_size))
        yield warning(
            f"{shares}: {plan.world_size - rest} wait for the others' last one ({idle:.0%} of the time)",
            "choose a number of processes that divides them",
        )
    else:
        yield ok(f"{shares}: {count // plan.world_size} each")
    sampler = plan.sampler
    yield ok(f"{sampler.steps_per_epoch:,} steps in an epoch, {plan.steps:,} in the run")


def weights(plan: Plan) -> Iterator[CheckResult]:
    """Check the weights that the run starts from."""
    encoder, init_from = plan.settings.model.encoder, plan.settings.train.init_from
    if plan.saved_step:
        yield ok(f"{plan.run}: resumes from step {plan.saved_step:,}")
    elif init_from is not None:
        step = open_checkpoint(init_from).train_state.step
        yield ok(f"train.init_from = {init_from}: step {step:,} is whole")
    elif encoder.weights == "imagenet":
        name = Path(torchvision.models.get_model_weights(encoder.name).IMAGENET1K_V1.url).name
        path = Path(torch.hub.get_dir(), "checkpoints", name)
        if path.is_file():
            yield ok(f"{path}: found, {path.stat().st_size / 1e6:,.0f} MB")
        else:
            yield warning(
                f"{path}: not found, so it is downloaded at the start, which compute nodes often cannot do",
                f"download it here: torchvision.models.{encoder.name}(weights='IMAGENET1K_V1'), or set"
                " model.encoder.weights to a file",
            )
    elif encoder.weights == "none":
        yield ok("model.encoder.weights = 'none': random weights")
    elif Path(encoder.weights).is_file():
        yield ok(f"{encoder.weights}: found")
    else:
        yield failure(
            f"model.encoder.weights = '{encoder.weights}': no such file",
            "correct the path (a relative one starts at the current folder)",
        )


def run(plan: Plan) -> Iterator[CheckResult]:
    """Check whether a run in the folder can be resumed with this config."""
    if plan.run is None:
        return
    damaged: list[str] = []
    saved = find_latest(plan.run, damaged.append)
    for text in damaged:
        yield warning(
            text.removeprefix("warning: "), "remove it, or leave it: the run resumes from an older one"
        )
    if saved is None:
        yield ok(f"{plan.run}: {'no checkpoint' if plan.run.exists() else 'does not exist'} yet")
        return
    fingerprint = make_fingerprint(plan.settings, shards=plan.split.sha256)
    if conflicts := resume_conflicts(saved.fingerprint, fingerprint):
        yield failure(
            f"{saved.folder}: is of another experiment: {'; '.join(conflicts)}",
            "restore these settings, or choose another --out",
        )
    else:
        yield ok(f"{plan.run}: step {saved.train_state.step:,} is whole")


def disk(plan: Plan) -> Iterator[CheckResult]:
    """Check write speed, free space for checkpoints, and their time against `train.grace_s`."""
    path = (plan.run or Path()).absolute()
    folder = next(each for each in (path, *path.parents) if os.path.lexists(each))
    try:
        speed = _write_speed(folder, _QUICK_PROBE_BYTES if plan.quick else _PROBE_BYTES)
    except OSError as error:
        yield failure(
            f"{folder}: cannot be written ({error.strerror})",
            "correct the path or its permissions, free the disk, or choose another --out",
        )
        return
    yield ok(f"{folder}: writes {speed / 1e6:,.0f} MB/s")
    train = plan.settings.train
    with torch.device("meta"):
        captioner = Captioner(plan.settings.model, len(plan.vocabulary))
    size, keep = checkpoint_bytes(captioner, bool(train.ema_decay)), train.keep_checkpoints
    check_disk_space(plan.run or folder, size, keep)
    yield ok(f"{folder}: has space for {keep + 3} checkpoints of {size / 1e6:,.0f} MB")
    # Measured saves include hashing.
    logged = max(plan.metric("save_s"), default=0.0)
    needed = max(logged, size / speed)
    source = f"by {plan.run}/{LOG_FILE}" if logged > size / speed else "at this disk's speed"
    summary = f"a checkpoint takes {format_duration(needed)} ({source}), train.grace_s is {train.grace_s:g}"
    cure = f"set train.grace_s to {max(30, round(4 * needed))} or more, and SLURM's --signal accordingly"
    if needed > train.grace_s:
        yield failure(summary + ": a job at its time limit would lose its work", cure)
    elif needed > train.grace_s / 2:
        yield warning(summary + ": a slow step or disk would lose the last steps", cure)
    else:
        yield ok(summary)


def _write_speed(folder: Path, size: int) -> float:
    """Write up to `size` bytes with fsync, and return bytes per second."""
    block = os.urandom(1 << 20)
    written, began = 0, time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        while written < size and (written == 0 or time.monotonic() - began < _PROBE_S):
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return written / max(1e-6, time.monotonic() - began)
