"""The training step beside the way that tutorials write it."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import AdamW

from captionscale import config
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.decoders.attention import AttentionDecoder
from captionscale.model.encoders.cnn import Encoder
from captionscale.tools.bench.race import Heat, Way, limit, race
from captionscale.train.losses import Target, cross_entropy, doubly_stochastic_penalty
from captionscale.vocab import END, PAD, START, UNK

_DECODER = config.Decoder(
    embed_size=512,
    hidden_size=512,
    attention_size=512,
    region_size=0,
    num_layers=1,
    attention_gate=True,
    word_head="linear",
    dropout=0.0,
)
"""The tutorial's. Without dropout: the ways draw masks in another order."""
_REGIONS = {0: "as they are", 512: "projected"}
"""Regions are looked at as the tutorial has them, and as our decoders have them."""
_FEATURE = 2048
_LEARNING = ("layer3", "layer4")
_NO_RATE, _CLIP_NORM = 0.0, 5.0
"""AdamW works, but all steps see the same weights."""
_ROUNDING = {torch.float32: 5e-4, torch.bfloat16: 0.05}
_NEGLIGIBLE = 0.1
"""Share of all gradients' norm."""
_SHARP = 5


@dataclass(frozen=True)
class Sizes:
    """Of what is raced."""

    images: int = 32
    words: int = 9490
    length: int = 22
    """Times that the longest caption takes; the others' are as COCO's."""
    grids: Sequence[int] = (14, 7)
    captions: int = 5
    """Of an image, in our whole step."""
    encoder: str = "resnet50"
    side: int = 224
    """Of a picture, in pixels."""
    precision: torch.dtype = torch.float32


def bench(*, rounds: int, sizes: Sizes | None = None) -> list[Heat]:
    """Race our decoder, then our whole step, against the tutorial's form.

    Args:
        rounds: Of each way.
        sizes: Other ones than a COCO model's.

    Raises:
        UserError: Loss or gradients differ by more than rounding.
    """
    sizes = sizes or Sizes()
    decoders = (
        _decoders(sizes, grid, region, rounds) for region, grid in itertools.product(_REGIONS, sizes.grids)
    )
    return [*decoders, _steps(sizes, rounds)]


def read(
    decoder: AttentionDecoder,
    features: Float[Tensor, "caption region feature"],
    tokens: Int[Tensor, "caption time"],
) -> tuple[Float[Tensor, "caption time word"], Float[Tensor, "caption time region"], list[int], Tensor]:
    """Read captions as the tutorial does, with the layers of a decoder of ours.

    Captions are sorted by length. At each time those that go on look at all regions, whose keys are computed
    anew, and go through the LSTM's cell and the vocabulary's matrix.

    Args:
        decoder: With one layer, a gate and the output `linear`.
        features: Of each caption's picture.
        tokens: What each time reads.

    Returns:
        Logits, where the decoder looked, the captions' lengths, and their order, the longest first.

    Source:
        The form of github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, written anew.
    """
    sorted_lengths, order = (tokens != PAD).sum(1).sort(descending=True)
    lengths = sorted_lengths.tolist()
    regions = decoder.region_projection(features[order]).relu()
    embeddings = decoder.embedding(tokens[order])
    hidden, cell = torch.tanh(decoder.initial_state(regions.mean(1))).chunk(2, 1)
    logits = regions.new_zeros(len(tokens), lengths[0], decoder.embedding.num_embeddings)
    looks = regions.new_zeros(len(tokens), lengths[0], regions.shape[1], dtype=torch.float32)
    assert decoder.gate is not None
    for time in range(lengths[0]):
        count = sum(length > time for length in lengths)
        seen, before = regions[:count], hidden[:count]
        keys, query = decoder.attention.key(seen), decoder.attention.query(before)
        weights = decoder.attention.energy(torch.tanh(keys + query.unsqueeze(1))).squeeze(2).softmax(1)
        context = decoder.gate(before).sigmoid() * (seen * weights.unsqueeze(2)).sum(1)
        hidden, cell = decoder.cells[0](
            torch.cat([embeddings[:count, time], context], 1), (before, cell[:count])
        )
        logits[:count, time] = decoder.output_projection(hidden)
        looks[:count, time] = weights
    return logits, looks, lengths, order


def _loss_of_tutorial(decoder: AttentionDecoder, features: Tensor, target: Target) -> Float[Tensor, ""]:
    """Return the loss of a word, with the doubly stochastic penalty that the tutorial has too."""
    logits, looks, lengths, order = read(decoder, features, target.input_tokens)
    said, wanted = (
        pack_padded_sequence(part, lengths, batch_first=True).data
        for part in (logits, target.tokens[order, 1:])
    )
    penalty = (1 - looks.sum(1)).square().sum() / len(wanted)
    return F.cross_entropy(said.float(), wanted) + penalty


def _loss_of_ours(
    model: Callable[..., tuple[Tensor, Tensor]], pictures: Tensor, target: Target
) -> Float[Tensor, ""]:
    """Return the loss of a word, as the training loop works it out."""
    following, rows = target.tokens[:, 1:], target.rows
    logits, looks = model(pictures, target.input_tokens, target.image_index, rows=rows)
    surprise = cross_entropy(logits, following, 0.0, rows) + doubly_stochastic_penalty(looks, following)
    return surprise.sum() / target.num_tokens.sum()


def _decoders(sizes: Sizes, grid: int, region: int, rounds: int) -> Heat:
    """Race forward and backward through the decoder alone."""
    torch.manual_seed(0)
    settings = _DECODER.model_copy(update={"region_size": region})
    decoder = AttentionDecoder(settings, _FEATURE, sizes.words).train()
    with torch.no_grad():
        # Where it looks everywhere alike, as at first, its gradient is little but rounding.
        for parameter in decoder.attention.parameters():
            parameter.mul_(_SHARP)
    features = torch.randn(sizes.images, grid**2, _FEATURE).relu().requires_grad_()
    target, learning = _target(features, 1, sizes), [features, *decoder.parameters()]
    ours = _learner(lambda: _loss_of_ours(decoder, features, target), learning, sizes)
    theirs = _learner(lambda: _loss_of_tutorial(decoder, features, target), learning, sizes)
    note = _compare(ours(), theirs(), sizes)
    heat = race(
        f"Decoder, there and back: {grid} x {grid} regions {_REGIONS[region]}, {_name(sizes.precision)}",
        "captions",
        [Way("captionscale", ours, sizes.images), Way("the tutorial's form", theirs, sizes.images)],
        rounds,
        by_cpu=True,
    )
    heat.notes += [f"{sizes.images} captions, {sizes.words:,} words.", note]
    heat.notes += [limit(ours, sizes.images * heat.lanes[0].cpu_ms, sizes.precision)]
    return heat


def _steps(sizes: Sizes, rounds: int) -> Heat:
    """Race whole steps: encoder, decoder, backward, clipping, AdamW."""
    torch.manual_seed(0)
    settings = config.Model(encoder=config.Encoder(name=sizes.encoder, trainable=_LEARNING), decoder=_DECODER)
    model = Captioner(settings, sizes.words).train()
    pictures = torch.randint(256, (sizes.images, 3, sizes.side, sizes.side), dtype=torch.uint8)
    _settle(model.encoder, pictures)
    plain = copy.deepcopy(model)
    decoder = plain.decoder
    assert isinstance(decoder, AttentionDecoder)
    one, several = (_target(pictures, captions, sizes) for captions in (1, sizes.captions))

    def loss_of_tutorial(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        encoder = plain.encoder
        colours = torch.addcmul(encoder.shift, pictures.float(), encoder.scale)
        grid = encoder.backbone(colours.contiguous(memory_format=layout))
        return _loss_of_tutorial(decoder, grid.flatten(2).transpose(1, 2), one)

    ours, theirs = ([p for p in each.parameters() if p.requires_grad] for each in (model, plain))
    fused, simple = AdamW(ours, _NO_RATE, fused=True), AdamW(theirs, _NO_RATE)
    with_several, with_one, tutorial = (
        _learner(loss_of, learning, sizes, optimizer)
        for loss_of, learning, optimizer in (
            (lambda: _loss_of_ours(model, pictures, several), ours, fused),
            (lambda: _loss_of_ours(model, pictures, one), ours, fused),
            (loss_of_tutorial, theirs, simple),
        )
    )
    in_our_layout = _learner(lambda: loss_of_tutorial(torch.channels_last), theirs, sizes, simple)
    note = _compare(with_one(), in_our_layout(), sizes)
    # Not before: in another layout convolutions round otherwise: fifty layers make 1 % of that in gradients.
    plain.encoder.backbone.to(memory_format=torch.contiguous_format)
    heat = race(
        f"The whole step: {sizes.encoder}, its {' and '.join(_LEARNING)} learning, {_name(sizes.precision)}",
        "captions",
        [
            Way(f"captionscale, {sizes.captions} captions a picture", with_several, len(several.tokens)),
            Way("captionscale, one", with_one, len(one.tokens)),
            Way("the tutorial's form, one", tutorial, len(one.tokens)),
        ],
        rounds,
        by_cpu=True,
    )
    heat.notes += [f"{sizes.images} pictures, {sizes.words:,} words.", note]
    heat.notes += [limit(with_several, len(several.tokens) * heat.lanes[0].cpu_ms, sizes.precision)]
    return heat


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def _settle(encoder: Encoder, pictures: Tensor) -> None:
    """Give batch norms these pictures' statistics: else numbers grow from layer to layer."""
    for module in encoder.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    encoder.backbone.train()
    with torch.no_grad():
        encoder(pictures)
    encoder.train()


def _target(pictures: Tensor, captions: int, sizes: Sizes) -> Target:
    """Return so many captions of each picture, as long as COCO's, but the first as long as any may be."""
    image_index = torch.arange(len(pictures)).repeat_interleave(captions)
    lengths = torch.normal(11.5, 2.4, (len(image_index), 1)).round().clamp(6, sizes.length)
    lengths[0] = sizes.length
    times = torch.arange(sizes.length + 1)
    tokens = torch.randint(UNK, sizes.words, (len(image_index), len(times)))
    tokens[:, 0] = START
    tokens = tokens.where(times != lengths, END).where(times <= lengths, PAD)
    return Target(pictures, tokens, image_index)


def _learner(
    loss_of: Callable[[], Tensor], learning: Sequence[Tensor], sizes: Sizes, optimizer: AdamW | None = None
) -> Callable[[], list[Tensor]]:
    """Return what computes loss and gradients, and takes the step of an optimiser."""

    def learn() -> list[Tensor]:
        for each in learning:
            each.grad = None
        with torch.autocast("cpu", sizes.precision, enabled=sizes.precision != torch.float32):
            loss = loss_of()
        torch.autograd.backward(loss)
        results = [loss.detach(), *(each.grad for each in learning if each.grad is not None)]
        if optimizer:
            nn.utils.clip_grad_norm_(learning, _CLIP_NORM)
            optimizer.step()
        return results

    return learn


def _compare(ours: list[Tensor], theirs: list[Tensor], sizes: Sizes) -> str:
    """Return by how much loss and gradients differ; more than rounding is an error."""
    # A small one may be a sum that cancels, such as that of the gate's bias, and then all of it is rounding.
    least = _NEGLIGIBLE * torch.stack([other.norm() for other in theirs[1:]]).norm()
    differences = [
        float((mine - other).norm() / other.norm().clamp(min=0 if other is theirs[0] else least))
        for mine, other in zip(ours, theirs, strict=True)
    ]
    if max(differences) > _ROUNDING[sizes.precision]:
        raise UserError(
            f"bench step: the two ways' loss or gradients differ by {max(differences):.0e} of themselves,"
            f" wanted at most {_ROUNDING[sizes.precision]:g}; tell us of it"
        )
    return (
        f"The losses differ by {differences[0]:.0e} of themselves, gradients by {max(differences[1:]):.0e}."
    )
