import numpy as np
import torch
from torch import Tensor, nn

from captionscale.config_model import EncoderConfig, Model
from captionscale.model.captioner import Captioner
from captionscale.model.encoders.encoder import Encoder
from captionscale.tools.caption_result import build_caption_results
from captionscale.vocab import END, SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary((*SPECIAL_TOKENS, "a", "dog"))


class WideGrid(Encoder):
    """Two rows of eight cells, after a class token: not the square that 17 regions would suggest."""

    num_prefix_tokens = 1

    def __init__(self, config: EncoderConfig):
        super().__init__(config, nn.Conv2d(3, 5, (16, 4), (16, 4)), feature_size=5)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 16, width // 4

    def forward_features(self, images: Tensor) -> Tensor:
        cells = super().forward_features(images)
        return torch.cat([cells.mean(1, keepdim=True), cells], 1).abs()


def test_attention_maps_have_the_declared_grid_without_prefix_tokens() -> None:
    torch.manual_seed(0)
    captioner = Captioner(Model(), len(VOCABULARY))
    captioner.encoder = WideGrid(EncoderConfig(name="tests:WideGrid"))
    captioner.decoder = type(captioner.decoder)(captioner.decoder.config, 5, len(VOCABULARY))
    features = captioner.eval().encode(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8))
    (result,) = build_caption_results(captioner, features, [[4, 5, END]], VOCABULARY, 32)
    assert result.words == ["a", "dog"]
    tokens = torch.tensor([[1, 4, 5]])
    with torch.no_grad():
        _, attention = captioner.decoder.teacher_forced(features, tokens, [3], torch.tensor([0]))
    for weights, expected in zip(result.attention_maps, attention[0], strict=False):
        assert weights.shape == (2, 8)
        np.testing.assert_allclose(weights, expected[1:].view(2, 8), rtol=1e-4)
        assert weights.sum() < 1
