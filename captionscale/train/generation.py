"""Generation of captions for a split, over all ranks."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import numpy as np
import torch
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
    """Return the constraints on generated captions: begin with `prefix`, contain all words of `require`.

    Raises:
        UserError: A word that is not in the vocabulary, too many words, or words required of samples.
    """
    prefix_tokens = [_token(word, vocabulary, "--prefix") for word in split_words(prefix)]
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
    if (count := len(prefix_tokens) + len(required)) >= max_words:
        raise UserError(
            f"--prefix and --require: found {count} words, expected fewer than the"
            f" run's data.max_words = {max_words}; leave some out"
        )
    dangling = {vocabulary.encode(word, 1)[1] for word in DANGLING} - {UNK}
    return Constraints(
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        allow_unknown=settings.allow_unknown,
        dangling_tokens=() if settings.allow_dangling else tuple(sorted(dangling)),
        prefix=tuple(prefix_tokens),
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
    """Caption every image of the loader's split once; `title` is that of the progress bar.

    Rank r of w takes the batches r, r + w, ... A sampled caption depends only on the loader's seed and the
    image. Generation stops if `should_stop`, called before each batch, returns true on any rank.

    Returns:
        COCO results by image id, the same on every rank; None if a rank stopped.

    Raises:
        UserError: As `make_constraints`.
    """
    split, vocabulary, max_words = loader.split, loader.vocabulary, loader.data.max_words
    constraints = make_constraints(settings, vocabulary, max_words, prefix=prefix, require=require)
    # Batches do not depend on the number of ranks.
    batches = np.split(np.arange(len(split)), range(settings.batch_size, len(split), settings.batch_size))
    batches = batches[ranks.rank :: ranks.world_size]
    results: list[Result] = []
    title += f" (1 of {ranks.world_size} ranks)" if ranks.world_size > 1 else ""
    training, stopped = captioner.training, False
    captioner.eval()
    with (
        progress(title, sum(map(len, batches)), quiet=not ranks.is_main, transient=True) as bar,
        torch.no_grad(),
        ranks.autocast(),
    ):
        for batch in loader.prefetch((items, None) for items in batches):
            if stopped := should_stop():
                break
            keys = [(loader.seed, image_id) for image_id in batch.image_ids]
            features = captioner.encode(batch.images.to(ranks.device))
            captions = generate_tokens(captioner.decoder, features, settings, max_words, constraints, keys)
            for image_id, tokens in zip(batch.image_ids, captions, strict=True):
                results.append(Result(image_id=image_id, caption=vocabulary.decode(tokens[0])))
            bar.advance(len(captions))
    captioner.train(training)
    gathered = ranks.gather([*results, *([None] if stopped else [])])
    if None in gathered:
        return None
    results = sorted(filter(None, gathered), key=lambda result: result["image_id"])
    captioned = [result["image_id"] for result in results]
    assert captioned == sorted(split.index["image_id"].tolist()), "an image was captioned twice or not at all"
    return results


def generate_tokens(
    decoder: StepDecoder,
    features: Features,
    settings: config.Search,
    max_words: int,
    constraints: Constraints,
    keys: Sequence[tuple[int, int]],
) -> list[list[list[int]]]:
    """Return the token ids of all captions of a beam, best first, or of a sampled caption.

    The decoder is in evaluation mode. The seed and image id in `keys` determine a sampled caption.

    Returns:
        Captions of each image: words, then the end token unless cut at `max_words`.

    Raises:
        UserError: Coverage is asked of a captioner without attention.
    """
    if settings.method == "sample":
        # The numbers of an image do not depend on the rest of the batch.
        uniforms = [
            np.random.default_rng([seed, image_id % 2**64]).random(max_words, np.float32)
            for seed, image_id in keys
        ]
        device = (features if isinstance(features, Tensor) else features[0]).device
        sampled, _ = sample(
            decoder,
            features,
            samples_per_image=1,
            max_words=max_words,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            constraints=constraints,
            uniforms=torch.from_numpy(np.stack(uniforms)).to(device),
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
