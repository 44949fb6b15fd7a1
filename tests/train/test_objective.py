"""The contract of objectives, for all in the registry."""

from pathlib import Path

import objective_contract
import pytest
from experiment import tiny_config

from captionscale.config import OBJECTIVES
from captionscale.errors import UserError
from captionscale.train.objective import objective_class


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_holds_the_contract(name: str, packed: Path, tmp_path: Path) -> None:
    config = objective_contract.config_of(name, tmp_path, packed)
    objective_contract.check(objective_class(name), config, packed)


def test_an_unknown_objective_and_a_class_of_another_kind_are_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.objective.*'cross-entropy', 'scst' or module:Class"):
        tiny_config(tmp_path, packed, "train.objective=reinforce")
    with pytest.raises(UserError, match=r"json:dumps: found .* derived from captionscale\.train\.objective"):
        objective_class("json:dumps")
