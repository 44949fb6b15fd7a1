"""A training step: our decoder and step next to the attention tutorial's, and the loop next to a bare one.

Measured gains (docs/performance.md), all of the fast path for CPUs: the decoder 6.65 (14 x 14 regions) and
4.26 times (7 x 7) as fast as the tutorial's; the whole step with five captions per image 5.65 times as many
captions per second. The training loop costs 0.7 % of a step.
"""

import argparse
import copy
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from baselines import tutorial_loss
from comparison import Candidate, Table, compare, product_bound, run
from jaxtyping import Float
from loop_overhead import DTYPES, loop_overhead
from synthetic_run import add_config, load_config
from torch import Tensor, nn
from torch.optim import AdamW

from captionscale.config_model import AttentionConfig, Model, TorchvisionConfig
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.decoders import recurrence
from captionscale.model.decoders.attention import AttentionDecoder
from captionscale.model.encoders.encoder import Encoder
from captionscale.train.losses import Target
from captionscale.train.step import micro_batch_loss
from captionscale.vocab import END, PAD, START, UNK

_PROJECTIONS = {0: "regions as they are", 512: "projected regions"}
"""The tutorial uses the encoder's features as they are; our configs project them."""
_FEATURE = 2048
_LEARNING = ("layer3", "layer4")
_LR, _CLIP_NORM = 0.0, 5.0
"""AdamW computes, but all steps see the same weights."""
_ROUNDING = {torch.float32: 5e-4, torch.bfloat16: 0.05}
_NEGLIGIBLE = 0.1
"""Of the norm of all gradients."""
_SHARP = 5


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the benchmark; return its tables."""
    parser = argparse.ArgumentParser("training_step.py", description="A training step.")
    add_config(parser)
    parser.add_argument("--images", type=int, metavar="N", help="of a step (default: 32)")
    # `length`: of the longest caption; the others' are as COCO's.
    coco = {"words": 9490, "length": 22, "grids": (14, 7), "captions": 5, "encoder": "resnet50", "side": 224}
    coco |= {"loop_steps": 20}
    tiny = {"words": 30, "length": 7, "grids": (2,), "captions": 2, "encoder": "resnet18", "side": 32}
    return run(
        _measure,
        parser,
        arguments,
        full={"images": 32, "rounds": 5, **coco},
        quick={"images": 4, "rounds": 1, **coco},
        tiny={"images": 4, "rounds": 1, **tiny, "loop_steps": 2},
    )


def _measure(options: argparse.Namespace) -> Iterator[Table]:
    with tempfile.TemporaryDirectory(prefix="captionscale-bench-") as name:
        settings = load_config(options, Path(name))
        options.dtype = DTYPES[settings.train.precision] if options.config else torch.float32
        for region, grid in itertools.product(_PROJECTIONS, options.grids):
            yield _decoders(options, grid, region)
        yield _whole_steps(options)
        yield loop_overhead(settings, Path(name), options.rounds * options.loop_steps)


def _decoder_settings(region: int) -> AttentionConfig:
    # Without dropout: the candidates draw masks in another order.
    return AttentionConfig(
        embed_size=512,
        hidden_size=512,
        attention_size=512,
        region_size=region,
        num_layers=1,
        attention_gate=True,
        word_head="linear",
        dropout=0.0,
    )


def _our_loss(
    model: Callable[..., tuple[Tensor, Tensor | None]], images: Tensor, target: Target
) -> Float[Tensor, ""]:
    """Return the loss per token as the training loop computes it."""

    def forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
        return model(*inputs[:4])  # Without the probability of scheduled sampling.

    target = replace(target, images=images)
    return micro_batch_loss(forward, target, target.num_tokens.float(), doubly_stochastic_weight=1.0)


def _decoders(options: argparse.Namespace, grid: int, region: int) -> Table:
    """Compare forward and backward through the decoder alone."""
    torch.manual_seed(0)
    decoder = AttentionDecoder(_decoder_settings(region), _FEATURE, options.words).train()
    with torch.no_grad():
        # Uniform attention, as at first, has a gradient of little but rounding.
        for parameter in decoder.attention.parameters():
            parameter.mul_(_SHARP)
    features = torch.randn(options.images, grid**2, _FEATURE).relu().requires_grad_()
    target, learning = _target(features, 1, options), [features, *decoder.parameters()]
    ours = _step(lambda: _our_loss(decoder.teacher_forced, features, target), learning, options.dtype)
    theirs = _step(lambda: tutorial_loss(decoder, features, target), learning, options.dtype)

    def in_one_block() -> list[Tensor]:
        with patch.object(recurrence, "CACHE_ELEMENTS", sys.maxsize):
            return ours()

    note = _check_equal(ours(), theirs(), options.dtype)
    table = compare(
        f"Decoder, forward and backward: {grid} x {grid} {_PROJECTIONS[region]}, {_name(options.dtype)}",
        "captions",
        [
            Candidate("captionscale", ours, options.images),
            Candidate("captionscale, all captions in one block", in_one_block, options.images),
            Candidate("the tutorial's form", theirs, options.images),
        ],
        options.rounds,
        by_cpu=True,
    )
    table.notes += [f"{options.images} captions, {options.words:,} words.", note]
    table.notes += [product_bound(ours, options.images * table.results[0].cpu_ms, options.dtype)]
    return table


def _whole_steps(options: argparse.Namespace) -> Table:
    """Compare encoder, decoder, backward, clipping and AdamW."""
    torch.manual_seed(0)
    encoder_settings = TorchvisionConfig(name=options.encoder, trainable=_LEARNING)
    settings = Model(encoder=encoder_settings, decoder=_decoder_settings(0))
    model = Captioner(settings, options.words).train()
    images = torch.randint(256, (options.images, 3, options.side, options.side), dtype=torch.uint8)
    _set_statistics(model.encoder, images)
    plain = copy.deepcopy(model)
    decoder = plain.decoder
    assert isinstance(decoder, AttentionDecoder)
    one, several = (_target(images, captions, options) for captions in (1, options.captions))

    def their_loss(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        encoder = plain.encoder
        pixels = torch.addcmul(encoder.shift, images.float(), encoder.scale)
        grid = encoder.backbone(pixels.contiguous(memory_format=layout))
        return tutorial_loss(decoder, grid.flatten(2).transpose(1, 2), one)

    ours, theirs = ([p for p in each.parameters() if p.requires_grad] for each in (model, plain))
    fused, simple = AdamW(ours, _LR, fused=True), AdamW(theirs, _LR)
    with_several, with_one, tutorial = (
        _step(loss, learning, options.dtype, optimizer)
        for loss, learning, optimizer in (
            (lambda: _our_loss(model, images, several), ours, fused),
            (lambda: _our_loss(model, images, one), ours, fused),
            (their_loss, theirs, simple),
        )
    )
    in_our_layout = _step(lambda: their_loss(torch.channels_last), theirs, options.dtype, simple)
    note = _check_equal(with_one(), in_our_layout(), options.dtype)
    # Convolutions in another layout round differently, which fifty layers raise to 1 % of a gradient.
    plain.encoder.backbone.to(memory_format=torch.contiguous_format)
    table = compare(
        f"Whole step: {options.encoder}, training {' and '.join(_LEARNING)}, {_name(options.dtype)}",
        "captions",
        [
            Candidate(
                f"captionscale, {options.captions} captions per image", with_several, len(several.tokens)
            ),
            Candidate("captionscale, one", with_one, len(one.tokens)),
            Candidate("the tutorial's form, one", tutorial, len(one.tokens)),
        ],
        options.rounds,
        by_cpu=True,
    )
    table.notes += [f"{options.images} images, {options.words:,} words.", note]
    cpu_ms = len(several.tokens) * table.results[0].cpu_ms
    table.notes += [product_bound(with_several, cpu_ms, options.dtype)]
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_statistics(encoder: Encoder, images: Tensor) -> None:
    """Give batch norms the statistics of these images: otherwise activations grow from layer to layer."""
    for module in encoder.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    encoder.backbone.train()
    with torch.no_grad():
        encoder(images)
    encoder.train()


def _target(images: Tensor, captions: int, options: argparse.Namespace) -> Target:
    """Return random captions of each image, with lengths as COCO's; the first has the maximum length."""
    image_index = torch.arange(len(images)).repeat_interleave(captions)
    lengths = torch.normal(11.5, 2.4, (len(image_index), 1)).round().clamp(6, options.length)
    lengths[0] = options.length
    times = torch.arange(options.length + 1)
    tokens = torch.randint(UNK, options.words, (len(image_index), len(times)))
    tokens[:, 0] = START
    tokens = tokens.where(times != lengths, END).where(times <= lengths, PAD)
    return Target(images, tokens, image_index)


def _step(
    loss: Callable[[], Tensor], learning: Sequence[Tensor], dtype: torch.dtype, optimizer: AdamW | None = None
) -> Callable[[], list[Tensor]]:
    """Return a function that takes a step, and returns the loss and the gradients."""

    def step() -> list[Tensor]:
        for each in learning:
            each.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss()
        torch.autograd.backward(value)
        results = [value.detach(), *(each.grad for each in learning if each.grad is not None)]
        if optimizer:
            nn.utils.clip_grad_norm_(learning, _CLIP_NORM)
            optimizer.step()
        return results

    return step


def _check_equal(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> str:
    """Compare loss and gradients."""
    # A small gradient may be a sum that cancels, such as that of the gate's bias: all of it is rounding.
    least = _NEGLIGIBLE * torch.stack([other.norm() for other in theirs[1:]]).norm()
    gaps = [
        float((mine - other).norm() / other.norm().clamp(min=0 if other is theirs[0] else least))
        for mine, other in zip(ours, theirs, strict=True)
    ]
    if max(gaps) > _ROUNDING[dtype]:
        raise UserError(
            f"loss or gradients of the two candidates differ by {max(gaps):.0e}, expected at most"
            f" {_ROUNDING[dtype]:g}; please report this"
        )
    return f"Relative differences: losses {gaps[0]:.0e}, gradients {max(gaps[1:]):.0e}."


if __name__ == "__main__":
    main()
