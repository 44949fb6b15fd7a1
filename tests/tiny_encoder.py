"""An encoder of two layers, for tests of anything but encoders: MobileNetV2 takes half the time of a run."""

from collections import OrderedDict

from torch import nn

from captionscale.config_model import EncoderConfig
from captionscale.model.encoders.encoder import Encoder


class TinyEncoder(Encoder):
    """Patches of 16 pixels."""

    def __init__(self, config: EncoderConfig):
        first = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(16, 32, 2, stride=2), nn.ReLU())
        super().__init__(config, nn.Sequential(OrderedDict(first=first, second=second)), feature_size=32)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 16, width // 16
