"""What self-critical training must show before its first step, and what stops it later."""

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

_LEAST_REWARD = 1.0
_LEAST_AGREEMENT = 0.1
_TOLERANCE = 0.02
# A word that tokenizers leave as it is, in place of a token that is none.
_STAND_INS = {END: "endofcaption", UNK: "unknownword"}


def check_rewards(
    rewards: Callable[[Sequence[int], Sequence[Sequence[int]]], Float64[np.ndarray, "caption"]],
    scale: float,
    captioner: Captioner,
    batch: Batch,
    vocabulary: Vocabulary,
    max_words: int,
) -> None:
    """Refuse self-critical training that would learn nothing, or something else.

    Args:
        rewards: Reward of each caption, given its image id and tokens.
        scale: Reward of a good caption that is no better than a reference.
        captioner: With the weights that training begins with.
        batch: Some train images on the captioner's device, with all their captions.
        vocabulary: The captioner's.
        max_words: Of a caption.

    Raises:
        UserError: People's captions that earn next to nothing, as they do with n-grams of another vocabulary;
            a reward that differs from the evaluator's CIDEr-D.
    """
    people = [[token for token in row[1:].tolist() if token] for row in batch.tokens.cpu()]
    image_index = batch.image_index.tolist()
    human_reward = float(rewards([batch.image_ids[owner] for owner in image_index], people).mean())
    references: list[list[list[int]]] = [[] for _ in batch.image_ids]
    for owner, caption in zip(image_index, people, strict=True):
        references[owner].append(caption)
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
        f"self-critical training begins: on {len(greedy):,} train images, people's captions have a reward of"
        f" {human_reward:.3f}, those of greedy search {greedy_reward:.3f}; CIDEr-D of the latter among these"
        f" images is {ours:.4f} as a reward, {theirs:.4f} by the evaluator"
    )
    if human_reward < _LEAST_REWARD * scale:
        raise UserError(
            f"self-critical training: people's own captions earn {human_reward:.3f}, wanted at least"
            f" {_LEAST_REWARD * scale:g}; the rewards are not of these captions' words: report this"
        )
    if len(pairs) > 1 and agreement.mean() < _LEAST_AGREEMENT:
        raise UserError(
            "self-critical training: CIDEr-D of people's captions of one image among themselves is"
            f" {agreement.mean():.3f}, wanted at least {_LEAST_AGREEMENT:g}, or there is nothing to learn"
            " from; lower data.min_count, or stay with cross-entropy"
        )
    if abs(ours - theirs) > _TOLERANCE * max(theirs, 0.1):
        raise UserError(
            f"self-critical training: the reward of greedy captions is {ours:.4f}, the evaluator's CIDEr-D of"
            f" the same {theirs:.4f}, wanted them equal; the vocabulary's words are not those of the"
            " evaluator: report this with its vocab.json"
        )


def check_collapse(train_state: TrainState, now: Mapping[str, float], settings: Scst) -> None:
    """Stop a run whose captions only its reward likes.

    Args:
        train_state: How far it is, and what its first sampled captions were like.
        now: What the last ones are like, as `SampleStats.compute` has it.
        settings: The config's section `scst`.

    Raises:
        UserError: Too many captions end in `with a` or the like, or too few differ.
    """
    step, best_step, began = train_state.step, train_state.best_step, train_state.initial_figures
    best = f"step {best_step:,} is the best so far" if best_step else "no captions were scored yet"
    cure = f"{best}; lower train.lr, or raise scst.cross_entropy_weight"
    dangling, most = now["dangling"], began["dangling"] + settings.max_dangling_increase
    if dangling > most:
        raise UserError(
            f"step {step:,}: collapsed: {dangling:.2%} of sampled captions end in 'a', 'with' or the like,"
            f" {began['dangling']:.2%} when it began, wanted at most {most:.2%}; {cure}, or"
            " scst.max_dangling_increase"
        )
    distinct, least = now["distinct"], began["distinct"] * settings.min_distinct_ratio
    if distinct < least:
        raise UserError(
            f"step {step:,}: collapsed: {distinct:.2%} of sampled captions differ from each other,"
            f" {began['distinct']:.2%} when it began, wanted at least {least:.2%}; {cure}, or lower"
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
