"""Checks of self-critical training: of rewards before the first step, of collapse later."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64

from captionscale.config import Scst
from captionscale.data.loader import Batch
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.search.generate import search
from captionscale.progress import say
from captionscale.score.ciderd import CiderDReward
from captionscale.score.metrics import measure
from captionscale.train.state import TrainState
from captionscale.vocab import END, UNK, Vocabulary

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
    """Refuse self-critical training whose rewards are wrong or teach nothing.

    Args:
        rewards: Reward of each caption, given its image id and tokens.
        scale: Reward of a good caption that is no better than a reference.
        captioner: With its initial weights.
        batch: Train images on the captioner's device, with all their captions.
        vocabulary: The captioner's.
        max_words: Of a caption.

    Raises:
        UserError: References have low rewards, as with n-grams of another vocabulary, or the reward differs
            from the evaluator's CIDEr-D.
    """
    human = [[token for token in row[1:].tolist() if token] for row in batch.tokens.cpu()]
    image_index = batch.image_index.tolist()
    human_reward = float(rewards([batch.image_ids[image] for image in image_index], human).mean())
    references: list[list[list[int]]] = [[] for _ in batch.image_ids]
    for image, caption in zip(image_index, human, strict=True):
        references[image].append(caption)
    greedy = _greedy(captioner, batch, max_words)
    pairs = [captions for captions in references if len(captions) > 1]
    agreement = CiderDReward([captions[1:] for captions in pairs])(
        np.arange(len(pairs)), [captions[0] for captions in pairs]
    )
    ours = float(CiderDReward(references)(np.arange(len(greedy)), greedy).mean())
    theirs = measure(
        {number: _words(caption, vocabulary) for number, caption in enumerate(greedy)},
        {
            number: [_words(each, vocabulary) for each in captions]
            for number, captions in enumerate(references)
        },
        ["CIDEr-D"],
    ).values["CIDEr-D"]
    greedy_reward = float(rewards(batch.image_ids, greedy).mean())
    say(
        f"self-critical training: on {len(greedy):,} train images, references have a reward of"
        f" {human_reward:.3f}, greedy captions {greedy_reward:.3f}; CIDEr-D of the latter among these images"
        f" is {ours:.4f} as a reward, {theirs:.4f} by the evaluator"
    )
    if human_reward < _MIN_REWARD * scale:
        raise UserError(
            f"self-critical training: references have a reward of {human_reward:.3f}, expected at"
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


@torch.no_grad()
def _greedy(captioner: Captioner, batch: Batch, max_words: int) -> list[list[int]]:
    training = captioner.training
    captioner.eval()
    found = search(
        captioner.decoder, captioner.encode(batch.images), beam=1, max_words=max_words, length_penalty=0.0
    )
    captioner.train(training)
    return [best[0].tokens for best in found]


def _words(caption: list[int], vocabulary: Vocabulary) -> str:
    return " ".join(_STAND_INS.get(token, vocabulary.words[token]) for token in caption)
