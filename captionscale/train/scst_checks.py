"""Checks of self-critical training: of rewards before the first step, of collapse later."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64

from captionscale.config import Scst
from captionscale.data.loader import Batch
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.decoders.decoder import StepDecoder
from captionscale.model.search.constraints import Features
from captionscale.model.search.generate import search
from captionscale.progress import say
from captionscale.score.ciderd import CiderDReward
from captionscale.score.metrics import measure
from captionscale.train.state import TrainState
from captionscale.vocab import END, PAD, UNK, Vocabulary

CHECKED_IMAGES = 256
"""Train images that `check_rewards` is given."""

_MIN_REWARD = 1.0
_MIN_AGREEMENT = 0.1
_TOLERANCE = 0.02
# Words that the tokenizer keeps, in place of special tokens.
_STAND_INS = {END: "endofcaption", UNK: "unknownword"}


def check_rewards(
    rewards: Callable[[Sequence[int], Sequence[Sequence[int]]], Float64[np.ndarray, "caption"]],
    scale: float,
    captioner: Captioner,
    batch: Batch,
    vocabulary: Vocabulary,
    max_words: int,
) -> None:
    """Check rewards on train images with all their captions.

    `rewards` gives the reward of each caption, `scale` that of a good caption no better than a reference.

    Raises:
        UserError: References have low rewards, as with n-grams of another vocabulary, or the reward differs
            from the evaluator's CIDEr-D.
    """
    references: list[list[list[int]]] = [[] for _ in batch.image_ids]
    image_index, tokens = batch.image_index.tolist(), batch.tokens.cpu()
    for image, row in zip(image_index, tokens[:, 1:].tolist(), strict=True):
        references[image].append([token for token in row if token != PAD])
    captions = [caption for each in references for caption in each]
    image_ids = np.repeat(batch.image_ids, [len(each) for each in references]).tolist()
    reference_reward = float(rewards(image_ids, captions).mean())
    training = captioner.training
    captioner.eval()
    with torch.no_grad():
        greedy = greedy_search(captioner.decoder, captioner.encode(batch.images), max_words)
    captioner.train(training)
    pairs = [each for each in references if len(each) > 1]
    scorer = CiderDReward([others for _, *others in pairs])
    agreement = scorer(np.arange(len(pairs)), [first for first, *_ in pairs])
    ours = float(CiderDReward(references)(np.arange(len(greedy)), greedy).mean())
    theirs = measure(
        {number: _words(caption, vocabulary) for number, caption in enumerate(greedy)},
        {number: [_words(one, vocabulary) for one in each] for number, each in enumerate(references)},
        ["CIDEr-D"],
    ).values["CIDEr-D"]
    greedy_reward = float(rewards(batch.image_ids, greedy).mean())
    say(
        f"self-critical training: on {len(greedy):,} train images, references have a reward of"
        f" {reference_reward:.3f}, greedy captions {greedy_reward:.3f}; CIDEr-D of the latter among these"
        f" images is {ours:.4f} as a reward, {theirs:.4f} by the evaluator"
    )
    if reference_reward < _MIN_REWARD * scale:
        raise UserError(
            f"self-critical training: references have a reward of {reference_reward:.3f}, expected at"
            f" least {_MIN_REWARD * scale:g}; the rewards are of another vocabulary: report this"
        )
    if len(pairs) > 1 and agreement.mean() < _MIN_AGREEMENT:
        raise UserError(
            "self-critical training: CIDEr-D among the references of an image is"
            f" {agreement.mean():.3f}, expected at least {_MIN_AGREEMENT:g}, or there is nothing to learn;"
            " lower data.min_count, or train with cross-entropy"
        )
    if abs(ours - theirs) > _TOLERANCE * max(theirs, 0.1):
        raise UserError(
            f"self-critical training: the reward of greedy captions is {ours:.4f}, the evaluator's CIDEr-D of"
            f" them {theirs:.4f}, expected equal values; the evaluator tokenizes words of the vocabulary"
            " differently: report this with its vocab.json"
        )


def check_collapse(train_state: TrainState, now: Mapping[str, float], settings: Scst) -> None:
    """Stop a run whose captions degenerate while their reward rises.

    Raises:
        UserError: Too many captions end in `with a` or the like, or too few are distinct.
    """
    step, best_step, began = train_state.step, train_state.best_step, train_state.initial_figures
    best = f"step {best_step:,} is the best so far" if best_step else "no captions were scored yet"
    cure = f"{best}; lower train.lr, or raise scst.cross_entropy_weight"
    dangling, most = now["dangling"], began["dangling"] + settings.max_dangling_increase
    if dangling > most:
        raise UserError(
            f"step {step:,}: collapsed: {dangling:.2%} of sampled captions end in 'a', 'with' or the like,"
            f" {began['dangling']:.2%} at the start, expected at most {most:.2%}; {cure}, or"
            " scst.max_dangling_increase"
        )
    distinct, least = now["distinct"], began["distinct"] * settings.min_distinct_ratio
    if distinct < least:
        raise UserError(
            f"step {step:,}: collapsed: {distinct:.2%} of sampled captions differ from each other,"
            f" {began['distinct']:.2%} at the start, expected at least {least:.2%}; {cure}, or lower"
            " scst.min_distinct_ratio"
        )


def greedy_search(decoder: StepDecoder, features: Features, max_words: int) -> list[list[int]]:
    """Return the tokens of the greedy caption of each image."""
    found = search(decoder, features, beam=1, max_words=max_words, length_penalty=0.0)
    return [captions[0].tokens for captions in found]


def _words(caption: list[int], vocabulary: Vocabulary) -> str:
    return " ".join(_STAND_INS.get(token, vocabulary.words[token]) for token in caption)
