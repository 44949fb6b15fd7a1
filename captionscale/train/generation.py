"""Generation of captions for a split, over all ranks."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from captionscale import config
from captionscale.data.loader import Loader
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError, did_you_mean
from captionscale.model.captioner import Captioner
from captionscale.model.decoders.decoder import StepDecoder
from captionscale.model.search.constraints import Constraints, Features
from captionscale.model.search.ensemble import Ensemble
from captionscale.model.search.generate import search
from captionscale.model.search.sampling import sample
from captionscale.progress import progress
from captionscale.score.diagnostics import DANGLING
from captionscale.score.results import Result
from captionscale.vocab import PAD, SPECIAL_TOKENS, UNK, Vocabulary, split_words

MAX_REQUIRED_WORDS = 4
"""Of one caption; each doubles the time of the search."""


def make_constraints(
    settings: config.Search,
    vocabulary: Vocabulary,
    max_words: int,
    *,
    prefix: str = "",
    require: Sequence[str] = (),
) -> Constraints:
    """Return the constraints on generated captions.

    Args:
        settings: The config's section `search`.
        vocabulary: The captioner's.
        max_words: Of a caption.
        prefix: Beginning of every caption.
        require: Words that every caption must contain.

    Raises:
        UserError: A word that is not in the vocabulary, too many words, or words required of samples.
    """
    beginning = [_token(word, vocabulary, "--prefix") for word in split_words(prefix)]
    required = []
    for text in dict.fromkeys(require):
        words = split_words(text)
        if len(words) != 1:
            raise UserError(
                f"--require '{text}': found {len(words)} words, expected one; give --require for each word"
            )
        required.append((_token(words[0], vocabulary, "--require"),))
    if len(required) > MAX_REQUIRED_WORDS:
        raise UserError(
            f"--require: found {len(required)} words, expected at most {MAX_REQUIRED_WORDS}; leave some out"
        )
    if required and settings.method == "sample":
        raise UserError(
            "--require: sampling cannot require words, expected search.method = 'beam'; leave"
            " out --require, or --set search.method=beam"
        )
    if len(beginning) + len(required) >= max_words:
        raise UserError(
            f"--prefix and --require: found {len(beginning) + len(required)} words, expected fewer than the"
            f" run's data.max_words = {max_words}; leave some out"
        )
    known = {token for word in DANGLING for token in vocabulary.encode(word, 1)[1:-1]} - {UNK}
    return Constraints(
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        allow_unknown=settings.allow_unknown,
        dangling_tokens=() if settings.allow_dangling else tuple(sorted(known)),
        prefix=tuple(beginning),
        required=tuple(required),
    )


def caption_split(
    captioner: Captioner | Ensemble,
    loader: Loader,
    settings: config.Search,
    ranks: Ranks,
    title: str,
    *,
    prefix: str = "",
    require: Sequence[str] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Result] | None:
    """Caption every image of the loader's split once.

    Rank r of w takes the batches r, r + w, ... A sampled caption depends only on the loader's seed and the
    image.

    Args:
        captioner: Not wrapped by an engine.
        loader: Of the split.
        settings: The config's section `search`.
        ranks: This process and its peers.
        title: Of the progress bar.
        prefix: As in `make_constraints`.
        require: As in `make_constraints`.
        should_stop: Called before each batch; generation stops if it returns true on any rank.

    Returns:
        COCO results by image id, the same on every rank; None if a rank stopped.

    Raises:
        UserError: As `make_constraints`.
    """
    max_words = loader.data.max_words
    constraints = make_constraints(settings, loader.vocabulary, max_words, prefix=prefix, require=require)
    split = loader.split
    # Batches do not depend on the number of ranks.
    items = np.arange(len(split))
    parts = [
        items[start : start + settings.batch_size] for start in range(0, len(split), settings.batch_size)
    ]
    mine = [parts[number] for number in ranks.local_indices(len(parts))]
    results: list[Result] = []
    title += f" (1 of {ranks.world_size} shares)" if ranks.world_size > 1 else ""
    training, left = captioner.training, False
    captioner.eval()
    with (
        progress(title, sum(map(len, mine)), quiet=not ranks.is_main, transient=True) as bar,
        ranks.autocast(),
    ):
        for batch in loader.prefetch((part, None) for part in mine):
            if left := should_stop():
                break
            images = batch.images.to(ranks.device)
            keys = [(loader.seed, image_id) for image_id in batch.image_ids]
            captions = generate_captions(
                captioner, images, loader.vocabulary, settings, max_words, constraints, keys
            )
            for image_id, caption in zip(batch.image_ids, captions, strict=True):
                results.append(Result(image_id=image_id, caption=caption))
            bar.advance(len(captions))
    captioner.train(training)
    gathered = ranks.gather([*results, *([None] if left else [])])
    if None in gathered:
        return None
    results = sorted(filter(None, gathered), key=lambda result: result["image_id"])
    captioned = [result["image_id"] for result in results]
    assert captioned == sorted(split.index["image_id"].tolist()), "an image was captioned twice or not at all"
    return results


@torch.no_grad()
def generate_captions(
    captioner: Captioner | Ensemble,
    images: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"],
    vocabulary: Vocabulary,
    settings: config.Search,
    max_words: int,
    constraints: Constraints,
    keys: Sequence[tuple[int, int]],
) -> list[str]:
    """Return the best caption of each image, or a sampled one.

    Args:
        captioner: In evaluation mode.
        images: On the captioner's device; or their features.
        vocabulary: The captioner's.
        settings: The config's section `search`.
        max_words: Of a caption.
        constraints: As of `make_constraints`.
        keys: Seed and image id of each image, which determine its sampled caption.

    Raises:
        UserError: Coverage is asked of a captioner without attention.
    """
    found = generate_tokens(
        captioner.decoder, captioner.encode(images), settings, max_words, constraints, keys
    )
    return [vocabulary.decode(captions[0]) for captions in found]


def generate_tokens(
    decoder: StepDecoder,
    features: Features,
    settings: config.Search,
    max_words: int,
    constraints: Constraints,
    keys: Sequence[tuple[int, int]],
) -> list[list[list[int]]]:
    """Return the token ids of all captions of a beam, best first, or of a sampled caption.

    Args:
        decoder: In evaluation mode.
        features: Of each image.
        settings: The config's section `search`.
        max_words: Of a caption.
        constraints: As of `make_constraints`.
        keys: As in `generate_captions`.

    Returns:
        Captions of each image: words, then the end token unless cut at `max_words`.

    Raises:
        UserError: Coverage is asked of a captioner without attention.
    """
    if settings.method == "sample":
        uniforms = np.stack([_uniforms(*key, max_words) for key in keys])
        first = features if isinstance(features, Tensor) else features[0]
        sampled, _ = sample(
            decoder,
            features,
            samples_per_image=1,
            max_words=max_words,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            constraints=constraints,
            uniforms=torch.from_numpy(uniforms).to(first.device),
        )
        return [[[token for token in tokens if token != PAD]] for tokens in sampled.tolist()]
    found = search(
        decoder,
        features,
        beam=settings.beam,
        max_words=max_words,
        length_penalty=settings.length_penalty,
        groups=settings.groups,
        diversity_penalty=settings.diversity_penalty,
        constraints=constraints,
    )
    return [[caption.tokens for caption in captions] for captions in found]


def _token(word: str, vocabulary: Vocabulary, place: str) -> int:
    token = vocabulary.encode(word, 1)[1]
    if token == UNK:
        known = vocabulary.words[len(SPECIAL_TOKENS) :]
        near = get_close_matches(word, known)
        cure = did_you_mean(word, near) if near else "see vocab.json in the checkpoint"
        raise UserError(f"{place}: '{word}' is not in this run's vocabulary ({len(known):,} words); {cure}")
    return token


def _uniforms(seed: int, image_id: int, count: int) -> Float32[np.ndarray, "time"]:
    """Return the uniform random numbers that sample an image's caption."""
    random = np.random.default_rng([seed, image_id % 2**64])
    return random.random(count, dtype=np.float32)
