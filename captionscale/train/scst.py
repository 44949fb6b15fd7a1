"""Self-critical sequence training: sampled captions, weighted by their rewards."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.data.shards import Split
from captionscale.distributed.ranks import Ranks
from captionscale.model.captioner import Captioner
from captionscale.model.search.sampling import sample
from captionscale.score import bleu
from captionscale.score.ciderd import CiderDReward
from captionscale.score.diagnostics import DANGLING
from captionscale.train.losses import Target
from captionscale.train.objective import Objective
from captionscale.train.scst_checks import CHECKED_IMAGES, check_collapse, check_rewards, greedy_search
from captionscale.train.state import TrainState
from captionscale.vocab import END, PAD, START, Vocabulary

_BLEU_4 = 3


class ScstObjective(Objective):
    """Maximizes the expected reward of sampled captions.

    A sample's advantage is its reward minus a baseline: the mean reward of the image's other samples, or the
    reward of greedy search. The reward is CIDEr-D (and BLEU-4, if weighted), with the end token as a word,
    and with document frequencies of the train shards. Sampling and training are without dropout.

    Source:
        Rennie et al. 2017, "Self-critical Sequence Training" (arXiv:1612.00563), with the greedy baseline;
        Luo 2020, "A Better Variant of Self-Critical Sequence Training" (arXiv:2003.09971), with the other
        samples'; the end token: Hu et al. 2023 (arXiv:2305.12254).
    """

    check_images = CHECKED_IMAGES
    progress_figures = ("reward",)

    def __init__(self, config: Config, captioner: Captioner, split: Split, vocabulary: Vocabulary):
        """Count the n-grams of all train captions."""
        super().__init__(config, captioner, split, vocabulary)
        self._settings, self._max_words, self._seed = config.scst, config.data.max_words, config.seed
        self.cross_entropy_weight = config.scst.cross_entropy_weight
        # Not evaluation mode: batch norms may be trained, and LSTMs on GPUs need training mode.
        captioner.decoder.without_dropout()
        self._references = [
            [vocabulary.encode(caption, self._max_words)[1:] for caption in split.captions(item)]
            for item in range(len(split))
        ]
        self._reward = CiderDReward(self._references)
        self._rows = {int(image_id): row for row, image_id in enumerate(split.index["image_id"])}
        self._dangling = {token for token, word in enumerate(vocabulary.words) if word in DANGLING}
        # Of the last step's samples: captions, reward, dangling, and, less one for each micro-batch, captions
        # and distinct captions.
        self._sums = np.zeros(5)

    def targets(self, batches: Sequence[tuple[int, Batch]], step: int, ranks: Ranks) -> list[Target]:
        """Sample captions of the images of each micro-batch."""
        self._sums = np.zeros(5)
        training = self.captioner.training
        self.captioner.eval()
        with torch.no_grad(), ranks.autocast():
            targets = [self._target(batch, (self._seed, step, number, 1), ranks) for number, batch in batches]
        self.captioner.train(training)
        return targets

    def check_start(self, batch: Batch) -> None:
        """See `check_rewards`."""
        check_rewards(self.rewards, self.scale, self.captioner, batch, self.vocabulary, self._max_words)

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Return means over samples; `distinct` is 0 if all captions are equal, 1 if none is repeated."""
        captions, reward, dangling, others, distinct = ranks.sum(*self._sums).tolist()
        return {
            "reward": reward / max(1, captions),
            "dangling": dangling / max(1, captions),
            "distinct": distinct / max(1, others),
        }

    def check_figures(self, state: TrainState, figures: Mapping[str, float]) -> None:
        """See `check_collapse`."""
        check_collapse(state, figures, self._settings)

    @property
    def scale(self) -> float:
        """Reward of a good caption that is no better than a reference."""
        return self._settings.cider_d_weight + self._settings.bleu_4_weight / 2

    def rewards(
        self, image_ids: Sequence[int], captions: Sequence[Sequence[int]]
    ) -> Float64[np.ndarray, "caption"]:
        """Return the weighted reward of each caption: tokens with the end token, if it was reached."""
        settings, rows = self._settings, [self._rows[image_id] for image_id in image_ids]
        rewards: Float64[np.ndarray, "caption"] = settings.cider_d_weight * self._reward(rows, captions)
        if settings.bleu_4_weight:
            candidates = [_text(caption) for caption in captions]
            references = [[_text(reference) for reference in self._references[row]] for row in rows]
            figures = bleu.corpus_score(bleu.statistics(candidates, references))[:, _BLEU_4]
            rewards = rewards + settings.bleu_4_weight * figures
        return rewards

    def _target(self, batch: Batch, seed: tuple[int, ...], ranks: Ranks) -> Target:
        settings, decoder = self._settings, self.captioner.decoder
        features = self.captioner.encode(batch.images)
        ranks.seed(*seed)
        sampled, _ = sample(
            decoder, features, samples_per_image=settings.samples_per_image, max_words=self._max_words
        )
        captions = [[token for token in caption if token != PAD] for caption in sampled.tolist()]
        lengths = [len(caption) for caption in captions]
        greedy: list[list[int]] = []
        if settings.baseline == "greedy":
            greedy = greedy_search(decoder, features, self._max_words)
        image_index = torch.arange(len(batch.image_ids), device=sampled.device).repeat_interleave(
            settings.samples_per_image
        )
        starts = torch.full((len(sampled), 1), START, device=sampled.device)
        tokens, references = torch.cat([starts, sampled], 1), []
        if self.cross_entropy_weight:
            references = list(batch.tokens)
            image_index = torch.cat([image_index, batch.image_index])
            lengths += batch.lengths

        def advantages() -> Float[Tensor, "sample"]:
            rewards = self._advantages(batch.image_ids, captions, greedy)
            return torch.from_numpy(rewards).to(sampled.device, torch.float32)

        tokens = pad_sequence([*tokens, *references], batch_first=True, padding_value=PAD)
        # A frozen encoder would compute the same features again.
        images = batch.images if self.captioner.encoder.is_trainable else features
        return Target(images, tokens, image_index, len(sampled), advantages, lengths)

    def _advantages(
        self, image_ids: list[int], captions: list[list[int]], greedy: list[list[int]]
    ) -> Float64[np.ndarray, "sample"]:
        samples = self._settings.samples_per_image
        rewards = self.rewards(np.repeat(image_ids, samples).tolist(), captions).reshape(-1, samples)
        if greedy:
            baseline = self.rewards(image_ids, greedy)[:, None]
        else:
            baseline = (rewards.sum(1, keepdims=True) - rewards) / (samples - 1)
        words = [[token for token in caption if token != END] for caption in captions]
        dangling = sum(bool(caption) and caption[-1] in self._dangling for caption in words)
        distinct = len(set(map(tuple, captions)))
        self._sums += len(captions), rewards.sum(), dangling, len(captions) - 1, distinct - 1
        advantages: Float64[np.ndarray, "sample"] = (rewards - baseline).ravel()
        return advantages


def _text(caption: Sequence[int]) -> str:
    return " ".join(map(str, caption))
