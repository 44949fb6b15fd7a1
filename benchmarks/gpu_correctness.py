"""Correctness on a GPU: gradients and captions next to the CPU's, host waits, resume."""

import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from decode import random_decoder
from gpu_model import (
    DEVICE,
    GPU,
    Report,
    build_model,
    exact_fp32,
    load_config,
    random_batch,
    synchronize,
    train_step,
)
from loop_overhead import NoValidation
from safetensors.torch import load_file
from synthetic_run import COCO_WORDS, write_shards
from torch import Tensor

from captionscale.config_model import AttentionConfig
from captionscale.distributed.ranks import Ranks
from captionscale.model.decoders.decoder import packed_index
from captionscale.model.search.generate import search
from captionscale.model.search.sampling import sample
from captionscale.train import loop
from captionscale.train.losses import cross_entropy
from captionscale.train.preemption import PreemptionFlag
from captionscale.train.run_folder import checkpoint_folder

_DECODERS = {
    "attention, 2 layers, gate": ("name=attention", "num_layers=2", "attention_gate=true"),
    "attention, maxout, tied weights": (
        "name=attention",
        "num_layers=1",
        "region_size=0",
        "word_head=maxout",
        "tie_weights=true",
    ),
    "top_down": ("name=top_down",),
    "plain (cuDNN's LSTM)": ("name=plain", "num_layers=1"),
}
# Relative errors of losses and gradients.
_LIMITS = {"fp32": (1e-5, 1e-3), "TF32": (1e-3, 2e-2), "bf16": (2e-2, 0.25), "fp16": (5e-3, 5e-2)}


def gradients(report: Report, _: Path, tiny: bool) -> None:
    """Compare losses and gradients on the GPU with those of the CPU in fp32, without dropout."""
    images, words = (2, 50) if tiny else (8, 400)
    sizes = ("embed_size=64", "hidden_size=96", "dropout=0.0")
    for name, options in _DECODERS.items():
        attention = () if "name=plain" in options else ("attention_size=64",)
        overrides = [f"model.decoder.{each}" for each in (*sizes, *attention, *options)]
        overrides += ["model.encoder.name=resnet18", "model.encoder.batch_norm=frozen"]
        config = load_config(False, *overrides, f"data.image_size={32 if tiny else 96}")
        batch = random_batch(images, words, config.data.image_size)
        expected_losses, expected = _losses_and_gradients(config, batch, words, "cpu", "fp32")
        norm = torch.stack([each.norm() for each in expected.values()]).norm()
        for precision, (loss_limit, gradient_limit) in _LIMITS.items():
            # Without a GPU, only to try this script.
            if not GPU and precision != "fp32":
                continue
            kind = "fp32" if precision == "TF32" else precision
            with exact_fp32() if precision == "fp32" else nullcontext():
                losses, found = _losses_and_gradients(config, batch, words, DEVICE, kind)
            gap = ((losses - expected_losses).abs() / expected_losses.abs()).max()
            report.check("gradients", f"{name}, {precision}: losses, relative", float(gap), loss_limit)
            errors = torch.stack([(found[key] - expected[key]).norm() for key in expected])
            what = f"{name}, {precision}: gradients, relative norm"
            report.check("gradients", what, float(errors.norm() / norm), gradient_limit)


def _losses_and_gradients(
    config: Any, batch: Any, words: int, device: str, precision: str
) -> tuple[Tensor, dict[str, Tensor]]:
    os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    with Ranks(precision) as ranks:
        model, here = build_model(config, words, ranks), batch.to(ranks.device)
        logits, _ = model.engine(here.images, here.tokens[:, :-1], here.lengths, here.image_index)
        rows = packed_index(here.lengths, here.tokens.shape[1] - 1, ranks.device)
        losses = cross_entropy(logits, here.tokens[:, 1:], 0.1, rows)
        model.engine.backward(losses.mean())
        scale = model.engine.scaler_state().get("scale", 1.0)
        found = {
            key: each.grad.float().cpu() / scale
            for key, each in model.captioner.named_parameters()
            if each.grad is not None
        }
        return losses.detach().float().cpu(), found


def captions(report: Report, _: Path, tiny: bool) -> None:
    """Compare captions of beam search and sampling with the CPU's, and alone with in a batch."""
    torch.manual_seed(0)
    words, images, size = (50, 4, 64) if tiny else (COCO_WORDS, 64, 2048)
    settings = (
        AttentionConfig(embed_size=32, hidden_size=32, attention_size=16) if tiny else AttentionConfig()
    )
    decoder = random_decoder(settings, size, words)
    features = (torch.randn(images, 1, size) + torch.randn(images, 49, size)).relu()
    uniforms = torch.rand(images * 5, 20)
    beam_options: dict[str, Any] = {"max_words": 20, "length_penalty": 0.7}
    sample_options: dict[str, Any] = {"samples_per_image": 5, "max_words": 20}
    expected = {beam: search(decoder, features, beam=beam, **beam_options) for beam in (1, 5)}
    expected_samples, _log_probs = sample(decoder, features, uniforms=uniforms, **sample_options)
    decoder.to(DEVICE)
    there = features.to(DEVICE)
    with exact_fp32():
        for beam, right in expected.items():
            found = search(decoder, there, beam=beam, **beam_options)
            pairs = [(one[0], other[0]) for one, other in zip(found, right, strict=True)]
            differ = sum(one.tokens != other.tokens for one, other in pairs)
            report.check(
                "captions", f"beam {beam}: differ from the CPU's, of {images}", differ, max(1, images // 50)
            )
            gaps = [abs(one.log_prob - other.log_prob) for one, other in pairs if one.tokens == other.tokens]
            report.check("captions", f"beam {beam}: log-probability", max(gaps), 1e-3)
            alone = [
                search(decoder, each, beam=beam, **beam_options)[0][0] for each in there[:16].unsqueeze(1)
            ]
            differ = sum(one.tokens != other[0].tokens for one, other in zip(alone, found, strict=False))
            report.check("captions", f"beam {beam}: alone and in a batch differ", differ, 0)
        samples, _log_probs = sample(decoder, there, uniforms=uniforms.to(DEVICE), **sample_options)
        padded = [
            torch.nn.functional.pad(each.cpu(), (0, 20 - each.shape[1]))
            for each in (samples, expected_samples)
        ]
        differ = int((padded[0] != padded[1]).any(1).sum())
        what = f"samples that differ from the CPU's, of {len(samples)}"
        report.check("captions", what, differ, max(2, len(samples) // 50))


def waits(report: Report, _: Path, tiny: bool) -> None:
    """Find where the host waits for the GPU within a step."""
    if not GPU:
        report.add("waits", skipped="no GPU")
        return
    config, words = load_config(tiny, "train.ema_decay=0.999"), 50 if tiny else COCO_WORDS
    with Ranks("bf16") as ranks:
        model, flag = build_model(config, words, ranks), PreemptionFlag()
        batches = [random_batch(16, words, config.data.image_size, seed=seed) for seed in range(2)]
        for step in range(3):
            train_step(model, step, batches, flag)
        synchronize()
        # torch warns of each wait once for each place.
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(model, 4, batches, flag)
        torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        report.add("waits", place=f"{Path(each.filename).name}:{each.lineno}", text=str(each.message)[:80])
    report.check("waits", "in a step of two micro-batches", len(caught), 0)


def resume(report: Report, folder: Path, tiny: bool) -> None:
    """Compare a run with one that resumes at half of its steps."""
    last = 2 if tiny else 20
    shards = write_shards(
        folder / "resume", {"train": 16, "val": 8} if tiny else {"train": 2048, "val": 256}, 64
    )
    overrides = [
        f"data.shards={shards}",
        "data.min_count=1",
        "train.keep_checkpoints=3",
        "train.ema_decay=0.99",
    ]
    overrides += [f"train.steps={last}", f"train.save_every={last // 2}", f"train.score_every={last}"]
    overrides += ["train.global_batch=8", "train.micro_batch=4"] if tiny else []
    precisions = ("fp32", "bf16", "fp16") if GPU else ("fp32",)
    for precision in precisions:
        config = load_config(tiny, *overrides, f"train.precision={precision}")
        first, second = folder / f"{precision}-one", folder / f"{precision}-resumed"
        with patch.object(loop, "Validation", NoValidation), exact_fp32():
            loop.train(config, first)
            shutil.copytree(first, second)
            shutil.rmtree(checkpoint_folder(second, last))
            loop.train(config, second)
        for file in sorted(checkpoint_folder(first, last).glob("*.safetensors")):
            expected, found = load_file(file), load_file(checkpoint_folder(second, last) / file.name)
            differ = sum(not torch.equal(expected[key], found[key]) for key in expected)
            report.check("resume", f"{precision}, {file.name}: differ, of {len(expected)} tensors", differ, 0)
