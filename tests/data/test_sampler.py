import numpy as np
import pytest

from captionscale.data.sampler import BatchSampler
from captionscale.errors import UserError


def some_orders() -> list[BatchSampler]:
    """Return orders of all kinds: ragged and equal shards, few and many, whole and cut micro-batches."""
    random = np.random.default_rng(4)
    found: list[BatchSampler] = []
    while len(found) < 60:
        shards, micro_batch = int(random.integers(1, 12)), int(random.integers(1, 9))
        sizes = random.integers(1, 30, shards) if random.random() < 0.7 else np.full(shards, 16)
        order = (
            tuple(sizes.tolist()),
            int(random.integers(5)),
            micro_batch * int(random.integers(1, 10)),
            micro_batch,
            int(random.integers(1, 6)),
        )
        # The micro-batches of one sample are refused where the streams are not equally long: see below.
        if sum(sizes) >= order[2] and (micro_batch > 1 or sum(sizes) % order[2] == 0):
            found.append(BatchSampler(*order))
    return found


ORDERS = some_orders()


def stream(order: BatchSampler, epoch: int, number: int) -> list[int]:
    """Return what one micro-batch number reads in an epoch."""
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [item for step in steps for item in order.micro_batches(step, 0, 1)[number][1].tolist()]


def test_an_epoch_holds_every_sample_exactly_once_on_any_number_of_ranks() -> None:
    for order in ORDERS:
        for world_size in range(1, min(8, order.micro_batches_per_step) + 1):
            # Another epoch for each: the law is about all of them.
            start = world_size * order.steps_per_epoch
            seen = [
                items
                for step in range(start, start + order.steps_per_epoch)
                for rank in range(world_size)
                for _, items in order.micro_batches(step, rank, world_size)
            ]
            np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(sum(order.shard_sizes)))


def test_a_micro_batch_does_not_depend_on_the_number_of_ranks() -> None:
    for order in ORDERS:
        for step in (0, order.steps_per_epoch - 1, 3 * order.steps_per_epoch):
            alone = [items.tolist() for _, items in order.micro_batches(step, 0, 1)]
            assert len(alone) == order.micro_batches_per_step
            for world_size in range(1, min(8, order.micro_batches_per_step) + 1):
                for rank in range(world_size):
                    share = order.micro_batches(step, rank, world_size)
                    assert [number for number, _ in share] == [
                        *range(rank, order.micro_batches_per_step, world_size)
                    ]
                    assert all(items.tolist() == alone[number] for number, items in share)


def test_no_micro_batch_is_empty_or_too_large_and_those_of_a_stream_are_alike() -> None:
    for order in ORDERS:
        steps = [order.micro_batches(step, 0, 1) for step in range(order.steps_per_epoch)]
        for number in range(order.micro_batches_per_step):
            sizes = [len(step[number][1]) for step in steps]
            assert 1 <= min(sizes) <= max(sizes) <= min(order.micro_batch, min(sizes) + 1)


def test_an_epoch_has_no_more_steps_than_its_samples_need() -> None:
    for order in ORDERS:
        assert order.steps_per_epoch == -(-sum(order.shard_sizes) // order.global_batch)


def test_a_step_is_the_same_whichever_steps_were_read_before() -> None:
    order = BatchSampler((16, 16, 9), seed=1, global_batch=8, micro_batch=4, shuffle_window=2)
    steps = range(4 * order.steps_per_epoch)
    forwards = {step: order.micro_batches(step, 1, 2)[0][1].tolist() for step in steps}
    for step in np.random.default_rng(0).permutation(steps).tolist():
        assert order.micro_batches(step, 1, 2)[0][1].tolist() == forwards[step]
        assert order.epoch(step) == step // order.steps_per_epoch


def test_every_pair_of_seed_and_epoch_has_an_order_of_its_own() -> None:
    # The sum of both would give seed 0 in epoch 1 what seed 1 has in epoch 0.
    read = {}
    for seed in range(4):
        order = BatchSampler((16,) * 8, seed, global_batch=16, micro_batch=8, shuffle_window=4)
        for epoch in range(4):
            read[seed, epoch] = tuple(stream(order, epoch, 0) + stream(order, epoch, 1))
    assert len(set(read.values())) == len(read) == 16


def test_a_stream_opens_no_more_than_its_part_of_the_shards_and_the_two_at_its_edges() -> None:
    for shards, streams in ((64, 8), (64, 3), (30, 7), (5, 8)):
        order = BatchSampler(
            (16,) * shards, seed=0, global_batch=4 * streams, micro_batch=4, shuffle_window=4
        )
        for number in range(streams):
            opened = {item // 16 for item in stream(order, 2, number)}
            assert len(opened) <= shards / streams + 2


def test_samples_are_shuffled_but_never_out_of_their_window_of_shards() -> None:
    for window in (1, 2, 4):
        order = BatchSampler((16,) * 12, seed=0, global_batch=4, micro_batch=4, shuffle_window=window)
        items = np.array(stream(order, 0, 0)).reshape(-1, 16 * window)
        for group in items:
            assert len(set(group // 16)) == window
            assert sorted(group) != group.tolist()
            if window > 1:
                assert len(set(group[:16] // 16)) > 1


def test_the_order_of_a_small_run_is_the_one_that_older_checkpoints_were_trained_in() -> None:
    # A run that resumes with another version must not read a sample twice.
    order = BatchSampler((3, 4, 2), seed=7, global_batch=4, micro_batch=2, shuffle_window=2)
    two_epochs = [[items.tolist() for _, items in order.micro_batches(step, 0, 1)] for step in range(6)]
    assert two_epochs == [
        [[1], [8]],
        [[2], [6, 5]],
        [[0, 7], [4, 3]],
        [[0], [4]],
        [[2], [5, 8]],
        [[1, 7], [6, 3]],
    ]


def test_more_ranks_than_micro_batches_are_refused() -> None:
    order = BatchSampler((40,), seed=0, global_batch=8, micro_batch=4, shuffle_window=1)
    assert order.micro_batches(0, 1, 2)
    with pytest.raises(UserError) as caught:
        order.micro_batches(0, 0, 3)
    for word in ("train.global_batch = 8", "train.micro_batch = 4", "3 processes"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "global_batch", "micro_batch"), [((3,), 8, 2), ((4, 3), 16, 2), ((5, 5), 4, 1)]
)
def test_a_split_too_small_for_one_sample_in_each_micro_batch_is_refused(
    sizes: tuple[int, ...], global_batch: int, micro_batch: int
) -> None:
    with pytest.raises(UserError) as caught:
        BatchSampler(sizes, seed=0, global_batch=global_batch, micro_batch=micro_batch, shuffle_window=1)
    for word in (f"{sum(sizes)} samples", "train.global_batch", "train.micro_batch"):
        assert word in str(caught.value)
