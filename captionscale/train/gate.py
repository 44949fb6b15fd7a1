"""What self-critical training must show before its first step, and what stops it later."""

from collections.abc import Mapping

import numpy as np
import torch

from captionscale.config import Scst
from captionscale.data.loader import Batch
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.search import search
from captionscale.progress import say
from captionscale.score.ciderd import Reward
from captionscale.score.metrics import measure
from captionscale.train.selfcritical import SelfCritical
from captionscale.train.standing import Standing
from captionscale.vocab import END, UNKNOWN, Vocabulary

IMAGES = 256
"""Train images that it looks at."""

_GREATEST_LR = 2e-4
_LEAST_REWARD = 1.0
_TOLERANCE = 0.02
# A word that tokenisers leave as it is, in place of a token that is none.
_STAND_INS = {END: "endofcaption", UNKNOWN: "unknownword"}


def open_gate(
    lr: float,
    objective: SelfCritical,
    captioner: Captioner,
    batch: Batch,
    vocabulary: Vocabulary,
    max_words: int,
) -> None:
    """Refuse self-critical training that would learn nothing, or something else.

    Args:
        lr: The decoder's peak learning rate.
        objective: What gives the rewards.
        captioner: With the weights that training begins with.
        batch: Some train images on the captioner's device, with all their captions.
        vocabulary: The captioner's.
        max_words: Of a caption.

    Raises:
        UserError: A learning rate at which captions fall apart; people's captions that earn next to nothing,
            as they do with n-grams of another vocabulary; a reward that differs from the evaluator's CIDEr-D.
    """
    if lr > _GREATEST_LR:
        raise UserError(
            f"train.lr = {lr:g} under self-critical training, wanted at most {_GREATEST_LR:g}, as higher ones"
            " make captions fall apart; set it to 5e-5 or so"
        )
    people = [[token for token in row[1:].tolist() if token] for row in batch.tokens.cpu()]
    owners = batch.owners.tolist()
    of_people = float(objective.rewards([batch.image_ids[owner] for owner in owners], people).mean())
    references: list[list[list[int]]] = [[] for _ in batch.image_ids]
    for owner, caption in zip(owners, people, strict=True):
        references[owner].append(caption)
    greedy = _greedy(captioner, batch, max_words)
    ours = float(Reward(references)(np.arange(len(greedy)), greedy).mean())
    theirs = measure(
        {number: _words(caption, vocabulary) for number, caption in enumerate(greedy)},
        {
            number: [_words(each, vocabulary) for each in captions]
            for number, captions in enumerate(references)
        },
        ["CIDEr-D"],
    ).values["CIDEr-D"]
    of_greedy = float(objective.rewards(batch.image_ids, greedy).mean())
    say(
        f"self-critical training: of {len(greedy):,} images, people's captions earn {of_people:.3f}, greedy"
        f" search's {of_greedy:.3f}; their CIDEr-D is {ours:.4f}, the evaluator's {theirs:.4f}"
    )
    if of_people < _LEAST_REWARD * objective.scale:
        raise UserError(
            f"self-critical training: people's own captions earn {of_people:.3f}, wanted at least"
            f" {_LEAST_REWARD * objective.scale:g}; the train split's captions do not repeat each other, or"
            " data.min_count leaves too few of their words: lower it, or stay with cross-entropy"
        )
    if abs(ours - theirs) > _TOLERANCE * max(theirs, 0.1):
        raise UserError(
            f"self-critical training: the reward of greedy captions is {ours:.4f}, the evaluator's CIDEr-D of"
            f" the same {theirs:.4f}, wanted them equal; the vocabulary's words are not those of the"
            " evaluator: report this with its vocab.json"
        )


def refuse_collapse(standing: Standing, now: Mapping[str, float], settings: Scst) -> None:
    """Stop a run whose captions only its reward likes.

    Args:
        standing: How far it is, and what its first sampled captions were like.
        now: What the last ones are like, as `Figures.read` has it.
        settings: The config's section `scst`.

    Raises:
        UserError: Too many captions end in `with a` or the like, or too few differ.
    """
    step, best_step, began = standing.step, standing.best_step, standing.began
    best = f"step {best_step:,} is the best so far" if best_step else "no captions were scored yet"
    cure = f"{best}; lower train.lr, or raise scst.cross_entropy"
    dangling, most = now["dangling"], began["dangling"] + settings.most_dangling
    if dangling > most:
        raise UserError(
            f"step {step:,}: collapsed: {dangling:.0%} of sampled captions end in 'a', 'with' or the like,"
            f" {began['dangling']:.0%} when it began, wanted at most {most:.0%}; {cure}"
        )
    distinct, least = now["distinct"], began["distinct"] * settings.least_distinct
    if distinct < least:
        raise UserError(
            f"step {step:,}: collapsed: of 100 sampled captions {100 * distinct:.0f} differ,"
            f" {100 * began['distinct']:.0f} when it began, wanted at least {100 * least:.0f}; {cure}"
        )


@torch.no_grad()
def _greedy(captioner: Captioner, batch: Batch, max_words: int) -> list[list[int]]:
    training = captioner.training
    captioner.eval()
    found = search(
        captioner.decoder, captioner.look(batch.images), beam=1, max_words=max_words, length_power=0.0
    )
    captioner.train(training)
    return [best[0].tokens for best in found]


def _words(caption: list[int], vocabulary: Vocabulary) -> str:
    return " ".join(_STAND_INS.get(token, vocabulary.words[token]) for token in caption)
