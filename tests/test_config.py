from pathlib import Path

import pytest
from pydantic import ValidationError

from captionscale import assets
from captionscale.config import Config, Search
from captionscale.config_renames import RENAMED
from captionscale.errors import UserError
from captionscale.toml import dumps, flatten, load

SMALL = '[data]\nshards = "shards"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, *changes: str) -> str:
    """Return the error of a file and changes, without the file's path in front."""
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        load(path, changes)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", assets.names("configs", ".toml"))
def test_every_shipped_config_loads_and_survives_a_round_trip(name, tmp_path) -> None:
    config = load(name)
    assert load(write(tmp_path, dumps(config))) == config


def test_changes_survive_a_round_trip(tmp_path) -> None:
    changes = ['model.encoder.trainable=["layer3", "layer4"]', "train.save_every=7", "train.clip_norm=inf"]
    config = load(
        write(tmp_path, SMALL), [*changes, "data.shards=a folder/ünd 'quotes'", "data.max_vocab_size=9"]
    )
    assert load(write(tmp_path, dumps(config))) == config
    assert config.data.shards == "a folder/ünd 'quotes'"


def test_what_is_printed_holds_every_key_that_has_a_value(tmp_path) -> None:
    text = dumps(load(write(tmp_path, SMALL)))
    unset = {"data.cache", "data.max_vocab_size", "model.decoder.region_size", "search.top_k"}
    unset |= {f"train.{key}" for key in ("steps", "save_every", "score_every", "init_from")}
    keys = set(flatten(load(write(tmp_path, SMALL)).model_dump()))
    assert keys - set(flatten(load(write(tmp_path, text)).model_dump(exclude_none=True))) == unset


def test_a_config_does_not_change(tmp_path) -> None:
    config = load(write(tmp_path, SMALL))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0
    assert config.with_beam(3).search == Search(beam=3)
    assert config.with_beam(None) == config
    assert config.search.beam == Search().beam


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("train.lr=2e-4", "train.lr", 2e-4),
        ("train.lr = 2e-4", "train.lr", 2e-4),
        ("seed=7", "seed", 7),
        ("data.flip=false", "data.flip", False),
        ("data.crop_scale=[0.9, 1]", "data.crop_scale", (0.9, 1.0)),
        ("model.encoder.trainable=['layer4']", "model.encoder.trainable", ("layer4",)),
        ("model.encoder.trainable=all", "model.encoder.trainable", "all"),
        ("model.encoder.name=mobilenet_v2", "model.encoder.name", "mobilenet_v2"),
        ('model.encoder.name="resnet18"', "model.encoder.name", "resnet18"),
        ("model.encoder.weights=a=b.pth", "model.encoder.weights", "a=b.pth"),
        ("data.shards=some folder", "data.shards", "some folder"),
        ("data.shards=s3://bucket/coco", "data.shards", "s3://bucket/coco"),
    ],
)
def test_a_change_says_what_toml_says_and_a_bare_word_is_a_string(tmp_path, change, path, value) -> None:
    assert flatten(load(write(tmp_path, SMALL), [change]).model_dump())[path] == value


def test_the_last_of_two_changes_counts_and_a_change_outdoes_the_file(tmp_path) -> None:
    config = load(write(tmp_path, f"seed = 1\n{SMALL}"), ["seed=2", "seed=3"])
    assert config.seed == 3


def test_a_file_may_leave_to_a_change_what_has_no_default(tmp_path) -> None:
    assert load(write(tmp_path, ""), ["data.shards=here"]).data.shards == "here"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            f"{SMALL}[train]\nglobl_batch = 3",
            "train: unknown key 'globl_batch'; did you mean 'global_batch'?",
        ),
        (
            f"{SMALL}[model.decoder]\nhiden_size = 3",
            (
                "model.decoder: unknown key 'hiden_size' with decoder 'attention'; did you mean"
                " 'hidden_size'? If not, leave it out, or change model.decoder.name"
            ),
        ),
        (f"{SMALL}[trian]\nlr = 1", "unknown key 'trian'; did you mean 'train'?"),
        (f"zebra = 1\n{SMALL}", "unknown key 'zebra'; known: data, model, scst, search, seed, train"),
        ("seed = 1", "key 'data' is missing; add it to the file or pass --set data=..."),
        (
            "[data]\nflip = true",
            "data: key 'shards' is missing; add it to the file or pass --set data.shards=...",
        ),
        (
            f"{SMALL}[train]\nepochs = 'many'",
            (
                "train: epochs = 'many': input should be a valid integer,"
                " unable to parse string as an integer (Passes over the train split.)"
            ),
        ),
        (
            f"{SMALL}[train]\nlr = 0",
            "train: lr = 0: input should be greater than 0 (Peak learning rate of the decoder.)",
        ),
        (
            f"{SMALL}[train]\nscore_metric = 'BLEU'",
            (
                "train: score_metric = 'BLEU': input should be 'BLEU-4', 'METEOR', 'ROUGE-L', 'CIDEr-D' or"
                " module:Class; did you mean 'BLEU-4'? (Metric of generated captions that selects the best"
                " checkpoint, or `module:Class`.)"
            ),
        ),
        (
            f"{SMALL}[train]\nglobal_batch = 32\nmicro_batch = 7",
            "train.global_batch = 32 is not a multiple of train.micro_batch = 7; change one of them",
        ),
        (
            f"{SMALL}crop_scale = [0.9, 0.5]",
            "data.crop_scale = [0.9, 0.5]: expected [least, greatest], both above 0",
        ),
        (
            f"model = 3\n{SMALL}",
            "model = 3: input should be a valid dictionary or instance of Model",
        ),
    ],
)
def test_what_a_file_has_wrong_is_told_in_one_line_with_its_place(tmp_path, text, error) -> None:
    assert refused(tmp_path, text) == error


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (
            "model.encoder.trainable=layer4",
            "trainable = 'layer4': input should be 'all' or 'none' or ",
        ),
        (
            "model.encoder.trainable=[3]",
            "trainable = [3]: input should be 'all' or 'none' or ",
        ),
        ("data.crop_scale=[0.5]", "crop_scale = [0.5]: field required (Range of a random crop"),
        (
            "data.crop_scale=[2, 3]",
            "crop_scale = [2, 3]: input should be less than or equal to 1 (Range",
        ),
    ],
)
def test_a_wrong_item_is_told_by_its_key_and_whole_value(tmp_path, change, start) -> None:
    # Told as `model.encoder.trainable.tuple[str, ...]: 0 = 3`, or as a missing key '1', before.
    error = refused(tmp_path, SMALL, change)
    assert error.startswith(f"--set {change}: {start}")
    assert "\n" not in error


def test_all_that_is_wrong_is_told_at_once(tmp_path) -> None:
    errors = refused(tmp_path, SMALL, "train.lr=0", "trian.lr=1", "data.crop_scale=[3, 4]").splitlines()
    assert len(errors) == 3


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("train.lr", "--set train.lr: no '='; write --set section.key=value"),
        (
            "model.encoder.name.x=1",
            "--set model.encoder.name.x=1: 'name' is a value, not a section; see captionscale config",
        ),
        (
            "train.global_bach=3",
            "--set train.global_bach=3: unknown key 'global_bach'; did you mean 'global_batch'?",
        ),
        ("=3", "--set =3: unknown key ''; known: data, model, scst, search, seed, train"),
    ],
)
def test_a_change_that_names_no_key_is_refused(tmp_path, change, error) -> None:
    assert refused(tmp_path, f"{SMALL}[model.encoder]\nname = 'resnet18'", change) == error


def test_broken_toml_is_told_with_its_line(tmp_path) -> None:
    error = refused(tmp_path, f"{SMALL}flip = maybe\n")
    assert error.startswith("not a TOML file: ")
    assert "line 3" in error
    assert error.endswith("; correct that line")
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xd8\xff\xe0  a JPEG")
    with pytest.raises(UserError, match="not a TOML file"):
        load(path)


def test_an_unknown_config_is_told_with_the_nearest_known_one() -> None:
    with pytest.raises(UserError) as caught:
        load("quickstrat")
    assert str(caught.value) == (
        "quickstrat: no such file, and no such name in configs/; did you mean 'quickstart'?"
    )


def test_a_config_is_found_by_path_and_by_name_with_or_without_its_suffix() -> None:
    path = assets.folder("configs") / "quickstart.toml"
    assert load("quickstart") == load("quickstart.toml") == load(path) == load(str(path))


def test_without_any_file_the_defaults_stand() -> None:
    config = Config.model_validate({"data": {"shards": "x"}})
    assert config.train.global_batch % config.train.micro_batch == 0
    assert set(flatten({"a": {}, "b": {"c": {"d": 1}}})) == {"b.c.d"}


def test_a_key_of_version_0_1_is_refused_with_its_new_name(tmp_path) -> None:
    assert refused(tmp_path, f"{SMALL}[train]\nkeep = 3", "search.length_power=1").splitlines() == [
        "train.keep is a key of version 0.1, expected train.keep_checkpoints; rename it",
        (
            "--set search.length_power=1: search.length_power is a key of version 0.1, expected"
            " search.length_penalty; rename it"
        ),
    ]
    assert refused(tmp_path, SMALL, "model.decoder.embed=3").endswith(
        "expected model.decoder.embed_size; rename it"
    )


def test_new_names_are_keys_and_old_names_are_not(tmp_path) -> None:
    keys = {"data.max_vocab_size", "train.init_from", "model.decoder.image_batch_norm"}
    for decoder in ("plain", "attention"):
        keys |= set(flatten(load(write(tmp_path, SMALL), [f"model.decoder.name={decoder}"]).model_dump()))
    assert set(RENAMED.values()) <= keys
    assert keys.isdisjoint(RENAMED)


def test_only_a_beam_has_groups(tmp_path) -> None:
    error = refused(tmp_path, f"{SMALL}[search]\nmethod = 'sample'\ngroups = 3")
    assert error.startswith("search.groups = 3 with search.method = 'sample', expected 1")


def test_an_unknown_encoder_is_refused_before_torch_is_imported(tmp_path) -> None:
    error = refused(tmp_path, f"{SMALL}[model.encoder]\nname = 'resnett18'")
    assert "or module:Class; did you mean 'resnet18'?" in error
    assert "'resnet18', 'resnet34'" in refused(tmp_path, f"{SMALL}[model.encoder]\nname = 'vgg16'")
