"""Self-critical training: rewards and gradients against brute force, checks, collapse, ranks, resuming."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from experiment import join_all, load_weights, max_abs_difference, start_training, tiny_config

from captionscale.config import Config, Scst
from captionscale.data.loader import Batch, Loader
from captionscale.data.shards import Split
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.search.generate import search
from captionscale.score.ciderd import cider_d
from captionscale.train.checkpoint import find_latest, open_checkpoint
from captionscale.train.log_reader import read_metric
from captionscale.train.loop import train
from captionscale.train.losses import cross_entropy, mask_unsampleable_tokens
from captionscale.train.scst import ScstObjective
from captionscale.train.scst_checks import check_collapse
from captionscale.train.state import TrainState
from captionscale.vocab import END, PAD, SPECIAL_TOKENS, START, UNK, Vocabulary

pytestmark = pytest.mark.long

SCST = ("train.objective=scst", "train.lr=2e-4", "train.label_smoothing=0.0")


@pytest.fixture(scope="module")
def source(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained by cross-entropy."""
    folder = tmp_path_factory.mktemp("source")
    train(
        tiny_config(folder, packed, "train.epochs=6", "train.score_every=18", "train.lr=5e-3"), folder / "run"
    )
    return folder / "run"


def config_of(folder: Path, packed: Path, source: Path, *changes: str) -> Config:
    return tiny_config(folder, packed, *SCST, f'train.init_from="{source}"', *changes)


@pytest.fixture
def objective(packed: Path, source: Path, tmp_path: Path) -> ScstObjective:
    return objective_of(config_of(tmp_path, packed, source), packed, source)


def objective_of(settings: Config, packed: Path, source: Path) -> ScstObjective:
    saved = open_checkpoint(source)
    return ScstObjective(settings, saved.captioner(), Split(packed, "train"), saved.vocabulary())


def test_the_reward_is_cider_d_with_the_end_token_and_the_train_splits_document_frequencies(
    objective: ScstObjective, packed: Path, source: Path
) -> None:
    split, vocabulary = Split(packed, "train"), open_checkpoint(source).vocabulary()
    ids = split.index["image_id"].tolist()
    texts = [
        [" ".join(map(str, vocabulary.encode(caption, 8)[1:])) for caption in split.captions(item)]
        for item in range(len(split))
    ]
    captions = [[int(token) for token in texts[(item + 1) % len(ids)][0].split()] for item in range(len(ids))]
    expected = cider_d([" ".join(map(str, caption)) for caption in captions], texts)
    assert objective.rewards(ids, captions) == pytest.approx(expected, abs=1e-9)
    own = [[int(token) for token in each[0].split()] for each in texts]
    assert own[0][-1] == END
    unfinished = [caption[:-1] for caption in own]
    assert (objective.rewards(ids, own) > objective.rewards(ids, unfinished)).mean() > 0.9


def test_bleu_4_is_added_to_the_reward_by_its_weight(packed: Path, source: Path, tmp_path: Path) -> None:
    only = objective_of(
        config_of(tmp_path, packed, source, "scst.cider_d_weight=0.0", "scst.bleu_4_weight=2.0"),
        packed,
        source,
    )
    split, vocabulary = Split(packed, "train"), open_checkpoint(source).vocabulary()
    (image_id,) = split.index["image_id"][:1].tolist()
    reference = vocabulary.encode(split.captions(0)[0], 8)[1:]
    # A reference matches itself in all n-grams; half of it is too short.
    whole, half = only.rewards([image_id, image_id], [reference, reference[: len(reference) // 2]])
    assert whole == pytest.approx(2.0, abs=1e-6)
    assert half < 1.0


class Reader(torch.nn.Module):
    """A decoder of three words whose logits depend on the last word alone, so that all can be enumerated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(7, 7))

    def start(self, features: torch.Tensor) -> tuple[torch.Tensor]:
        return (features.mean((1, 2)),)

    def step(
        self, tokens: torch.Tensor, state: tuple[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor], None]:
        return self.logits[tokens], state, None

    def select(self, state: tuple[torch.Tensor], rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (state[0][rows],)


def test_the_gradient_equals_that_of_the_expected_reward(
    packed: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config_of(tmp_path, packed, source, "data.max_words=2")
    # More than a config allows: the mean has to be near the expectation.
    many = settings.scst.model_copy(update={"samples_per_image": 20_000})
    settings = settings.model_copy(update={"scst": many})
    reader = Reader()
    captioner = open_checkpoint(source).captioner()
    split = Split(packed, "train")
    vocabulary = Vocabulary((*SPECIAL_TOKENS, "red", "blue", "circle"))
    objective = ScstObjective(settings, captioner, split, vocabulary)
    captioner.decoder = reader
    logits = reader.logits.clone()
    logits[:, [PAD, START, 3]] = -torch.inf
    losses = -logits.log_softmax(1)

    def reward(_: list[int], captions: list[list[int]]) -> np.ndarray:
        return np.array([len(set(caption)) + 2.0 * (caption[0] == 4) for caption in captions])

    monkeypatch.setattr(objective, "rewards", reward)
    expected = torch.zeros(())
    tokens = [END, 4, 5, 6]
    for caption in [[END]] + [[first, second] for first, second in itertools.product(tokens[1:], tokens)]:
        loss = sum(losses[token, target] for token, target in itertools.pairwise([START, *caption]))
        expected = expected + torch.exp(-loss) * float(reward([0], [caption])[0])
    expected.backward()
    exact, reader.logits.grad = reader.logits.grad.clone(), None

    batch = Batch(
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 1, dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
        [int(split.index["image_id"][0])],
    )
    with Ranks() as ranks:
        (target,) = objective.targets([(0, batch)], 0, ranks)
    assert target.num_sampled == 20000
    logits = reader.logits[target.tokens[:, :-1]].flatten(0, 1)[target.rows]
    losses = cross_entropy(mask_unsampleable_tokens(logits, target), target.tokens[:, 1:], 0.0, target.rows)
    # The gradient of a mean over captions, not over tokens.
    (losses @ target.weights(torch.tensor([20000.0, 0.0]), 0.0)).backward()
    estimate = -reader.logits.grad
    assert (estimate - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("baseline", ["samples", "greedy"])
def test_advantages_are_rewards_minus_the_baseline_and_depend_on_the_seed(
    packed: Path, source: Path, tmp_path: Path, baseline: str
) -> None:
    settings = config_of(tmp_path, packed, source, f"scst.baseline={baseline}", "scst.samples_per_image=3")
    objective = objective_of(settings, packed, source)
    split = Split(packed, "train")
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(
        images, torch.zeros(2, 1, dtype=torch.long), torch.arange(2), split.index["image_id"][:2].tolist()
    )
    with Ranks() as ranks:
        (one,), (same,), (other,) = (objective.targets([(0, batch)], step, ranks) for step in (4, 4, 5))
    assert torch.equal(one.tokens, same.tokens)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)
    assert one.image_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert one.num_tokens[0] == int((one.tokens[:, 1:] != PAD).sum())
    captions = [[token for token in row if token != PAD] for row in one.tokens[:, 1:].tolist()]
    ids = [batch.image_ids[image] for image in one.image_index.tolist()]
    rewards = objective.rewards(ids, captions).reshape(2, 3)
    advantages = one.advantages().reshape(2, 3).numpy()
    if baseline == "samples":
        others = (rewards.sum(1, keepdims=True) - rewards) / 2
        assert advantages == pytest.approx(rewards - others, abs=1e-6)
        assert advantages.sum(1) == pytest.approx(np.zeros(2), abs=1e-5)
    else:
        captioner = open_checkpoint(source).captioner()
        features = captioner.encode(images)
        greedy = search(captioner.decoder, features, beam=1, max_words=8, length_penalty=0.0)
        baseline_ = objective.rewards(batch.image_ids, [best[0].tokens for best in greedy])
        assert advantages == pytest.approx(rewards - baseline_[:, None], abs=1e-6)


def test_sampling_and_training_have_no_dropout(packed: Path, source: Path, tmp_path: Path) -> None:
    settings = config_of(tmp_path, packed, source)
    assert settings.model.decoder.dropout == 0.5
    saved, split = open_checkpoint(source), Split(packed, "train")
    captioner = saved.captioner()
    objective = ScstObjective(settings, captioner, split, saved.vocabulary())
    images, ids = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), split.index["image_id"][:2].tolist()
    batch = Batch(images, torch.zeros(2, 1, dtype=torch.long), torch.arange(2), ids)
    with Ranks() as ranks:
        (target,) = objective.targets([(0, batch)], 0, ranks)
    both = [
        captioner.train(mode)(target.images, target.input_tokens, target.lengths, target.image_index)[0]
        for mode in (True, False)
    ]
    assert torch.equal(*both)
    masked = mask_unsampleable_tokens(both[0], target)
    assert (masked[:, [PAD, START, UNK]] == -torch.inf).all()
    # In references, which come last, the unknown token is a word like others.
    half = replace(target, num_sampled=4)
    sampled = sum(half.lengths[:4])
    masked = mask_unsampleable_tokens(both[0], half)
    assert (masked[:sampled, UNK] == -torch.inf).all()
    assert torch.equal(masked[sampled:], both[0][sampled:])


def test_self_critical_training_raises_the_reward(packed: Path, source: Path, tmp_path: Path) -> None:
    settings = config_of(tmp_path, packed, source, "model.decoder.dropout=0.0")
    saved, split = open_checkpoint(source), Split(packed, "train")
    captioner, loader = saved.captioner(), Loader(split, saved.vocabulary(), settings.data)
    objective = ScstObjective(settings, captioner, split, saved.vocabulary())
    (batch,) = loader.prefetch([(np.arange(48), None)])
    loader.close()
    with torch.no_grad():
        features = replace(batch, images=captioner.encode(batch.images).half())
    adam, rewards = torch.optim.Adam(captioner.decoder.parameters(), lr=5e-3), []
    with Ranks() as ranks:
        for step in range(40):
            (target,) = objective.targets([(0, features)], step, ranks)
            logits, _ = captioner(target.images, target.input_tokens, target.lengths, target.image_index)
            weights_ = target.weights(target.num_tokens.double(), objective.cross_entropy_weight)
            (cross_entropy(logits, target.tokens[:, 1:], 0.0, target.rows) @ weights_).backward()
            adam.step()
            adam.zero_grad()
            rewards.append(objective.figures(ranks)["reward"])
    assert np.mean(rewards[-5:]) > 1.5 * np.mean(rewards[:5])


def test_two_ranks_and_a_resumed_run_have_the_weights_of_one_process(
    packed: Path, source: Path, tmp_path: Path
) -> None:
    changes = (
        "train.steps=4",
        "train.score_every=4",
        "train.save_every=1",
        "scst.cross_entropy_weight=0.2",
        "train.ema_decay=0.9",
        "train.log_every=2",
    )
    settings = config_of(tmp_path, packed, source, *changes)
    runs = [tmp_path / "alone", tmp_path / "three", tmp_path / "resumed"]
    join_all([*start_training(1, settings, runs[0]), *start_training(3, settings, runs[1])])
    # Two ranks resume from the checkpoint of the last step but one.
    (runs[2] / "checkpoints").mkdir(parents=True)
    (runs[0] / "checkpoints" / "step-00000003").rename(runs[2] / "checkpoints" / "step-00000003")
    join_all(start_training(2, settings, runs[2]))
    first = load_weights(runs[0])
    assert max_abs_difference(first, load_weights(source)) > 1e-4
    for run in runs[1:]:
        assert max_abs_difference(load_weights(run), first) < 2e-6
    logged = [read_metric(run, "distinct")[4] for run in runs]
    assert logged == pytest.approx([logged[0]] * 3)


def check_start_of(
    settings: Config, packed: Path, source: Path, vocabulary: Vocabulary | None = None
) -> None:
    saved = open_checkpoint(source)
    split, captioner = Split(packed, "train"), saved.captioner()
    vocabulary = vocabulary or saved.vocabulary()
    objective = ScstObjective(settings, captioner, split, vocabulary)
    loader = Loader(split, saved.vocabulary(), settings.data)
    (batch,) = loader.prefetch([(np.arange(48), None)])
    loader.close()
    objective.check_start(batch)


def test_the_checks_pass_with_valid_rewards_and_report_them(
    packed: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_start_of(config_of(tmp_path, packed, source), packed, source)
    assert "on 48 train images, references have a reward of " in capsys.readouterr().err


def test_a_high_learning_rate_is_refused_when_the_config_is_read(
    packed: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"train\.lr = 0\.0005 with train\.objective = 'scst', expected at most"
    ):
        config_of(tmp_path, packed, source, "train.lr=5e-4")


def test_the_checks_refuse_rewards_of_another_vocabulary(packed: Path, source: Path, tmp_path: Path) -> None:
    words = open_checkpoint(source).vocabulary().words
    shifted = Vocabulary((*SPECIAL_TOKENS, *words[len(SPECIAL_TOKENS) + 1 :], words[len(SPECIAL_TOKENS)]))
    with pytest.raises(UserError, match="references have a reward of 0"):
        check_start_of(config_of(tmp_path, packed, source), packed, source, shifted)


COLLAPSES = {
    (
        0.31,
        0.9,
    ): "step 70: collapsed: 31.00% of sampled captions end in 'a', 'with' or the like, 10.00% at the"
    " start, expected at most 30.00%; step 60 is the best so far; lower train.lr",
    (0.1, 0.08): "step 70: collapsed: 8.00% of sampled captions differ from each other, 90.00% at the start,"
    " expected at least 9.00%;",
}


@pytest.mark.parametrize("now", COLLAPSES)
def test_a_collapse_stops_the_run(now: tuple[float, float]) -> None:
    train_state = TrainState(step=70, best_step=60, initial_figures={"dangling": 0.1, "distinct": 0.9})
    check_collapse(train_state, {"dangling": 0.29, "distinct": 0.1}, Scst())
    with pytest.raises(UserError) as caught:
        check_collapse(train_state, dict(zip(("dangling", "distinct"), now, strict=True)), Scst())
    assert COLLAPSES[now] in str(caught.value)


def test_a_run_that_collapses_stops_and_keeps_its_checkpoints(
    packed: Path, source: Path, tmp_path: Path
) -> None:
    settings = config_of(
        tmp_path, packed, source, "scst.min_distinct_ratio=1.0", "train.save_every=1", "train.epochs=9"
    )
    with pytest.raises(UserError, match=r"collapsed: .* of sampled captions differ from each other"):
        train(settings, tmp_path / "run")
    assert find_latest(tmp_path / "run", pytest.fail) is not None


def test_another_vocabulary_or_model_is_refused_to_start_from(
    packed: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.init_from = .*: its vocabulary of .* words is not this"):
        train(config_of(tmp_path, packed, source, "data.min_count=30"), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"weights are of another model, the first 'decoder.*take the section model of"
    ):
        train(config_of(tmp_path, packed, source, "model.decoder.hidden_size=8"), tmp_path / "run")


def test_a_run_starts_from_the_averaged_weights_of_another(packed: Path, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, packed, "train.ema_decay=0.9", "train.lr=5e-3"), tmp_path / "first")
    nothing = ("train.steps=1", "train.lr=1e-12", "train.encoder_lr=1e-12", "train.weight_decay=0.0")
    settings = tiny_config(tmp_path, packed, f'train.init_from="{tmp_path / "first"}"', *nothing)
    train(settings, tmp_path / "second")
    first = open_checkpoint(tmp_path / "first")
    assert isinstance(first.captioner(), Captioner)
    assert max_abs_difference(load_weights(tmp_path / "second"), first.weights() | first.ema_weights()) < 1e-9
    assert max_abs_difference(load_weights(tmp_path / "second"), first.weights()) > 1e-4
