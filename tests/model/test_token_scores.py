import pytest
import torch
from tiny_decoders import SEARCHES, peaked_decoder

from captionscale.config_model import DECODERS
from captionscale.model.search.constraints import Constraints
from captionscale.model.search.ensemble import EnsembleDecoder
from captionscale.model.search.generate import search
from captionscale.model.search.token_scores import score_captions
from captionscale.vocab import END, START


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("beam", [1, 4])
def test_the_token_scores_of_a_caption_sum_to_the_log_probability_of_the_search(name, beam) -> None:
    decoder, features = peaked_decoder(name, 0)
    found = search(decoder, features, beam=beam, max_words=6, length_penalty=0.7)
    for rank in range(beam):
        traces = score_captions(decoder, features, [captions[rank].tokens for captions in found])
        for captions, trace in zip(found, traces, strict=True):
            assert len(trace.log_probs) == len(captions[rank].tokens)
            total = float(trace.log_probs.sum())
            assert total == pytest.approx(captions[rank].log_prob, rel=1e-4)


@pytest.mark.parametrize("name", ["attention", "top_down"])
def test_attention_equals_that_of_teacher_forcing(name) -> None:
    decoder, features = peaked_decoder(name, 1)
    captions = [each[0].tokens for each in search(decoder, features, beam=4, max_words=6, length_penalty=0.7)]
    for row, (tokens, trace) in enumerate(
        zip(captions, score_captions(decoder, features, captions), strict=True)
    ):
        read = torch.tensor([[START, *tokens[:-1]]])
        with torch.no_grad():
            logits, attention = decoder.teacher_forced(
                features[row : row + 1], read, [len(tokens)], torch.tensor([0])
            )
        torch.testing.assert_close(trace.attention, attention[0])
        likely = logits.log_softmax(1)[range(len(tokens)), tokens]
        torch.testing.assert_close(trace.log_probs, likely)
        torch.testing.assert_close(trace.attention.sum(1), torch.ones(len(tokens)))


def test_captions_of_other_lengths_in_the_batch_change_nothing() -> None:
    decoder, features = peaked_decoder("attention", 2)
    captions = [[4, END], [5, 4, 6, 5, END], [4, 4, 4], [END], []]
    together = score_captions(decoder, features, captions)
    for row, tokens in enumerate(captions):
        [alone] = score_captions(decoder, features[row : row + 1], [tokens])
        torch.testing.assert_close(alone.log_probs, together[row].log_probs)
        if tokens:
            torch.testing.assert_close(alone.attention, together[row].attention)
        assert len(alone.log_probs) == len(tokens)


def test_a_plain_decoder_and_an_ensemble_look_nowhere() -> None:
    plain, features = peaked_decoder("plain", 0)
    assert score_captions(plain, features, [[4, END]] * len(features))[0].attention is None
    first, _ = peaked_decoder("attention", 0)
    traces = score_captions(EnsembleDecoder([first, plain]), (features, features), [[4, END]] * len(features))
    assert {trace.attention for trace in traces} == {None}


@pytest.mark.parametrize("method", SEARCHES)
def test_every_search_s_captions_can_be_read_again(method) -> None:
    decoder, features = peaked_decoder("top_down", 3)
    found = SEARCHES[method](decoder, features, Constraints(), 6)
    traces = score_captions(decoder, features, [captions[0] for captions in found])
    assert all(bool((trace.log_probs <= 0).all()) for trace in traces)
