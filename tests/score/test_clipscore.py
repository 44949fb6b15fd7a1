import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captionscale.data.shards import Split
from captionscale.errors import UserError
from captionscale.score import clipscore

TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny CLIP; open_clip knows it as `tiny`, and its twin without the quick GELU."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install 'captionscale[clip]'")
    folder = tmp_path_factory.mktemp("clip")
    for name, quick in {"tiny": True, "tiny-slow": False}.items():
        (folder / f"{name}.json").write_text(json.dumps(TINY | {"quick_gelu": quick}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def by_hand(image: np.ndarray, caption: np.ndarray, references: list[np.ndarray]) -> tuple[float, float]:
    """The paper's formulas, for one image."""

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / np.sqrt(one @ one) / np.sqrt(other @ other))

    first = 2.5 * max(cosine(image, caption), 0)
    second = max(0, *(cosine(caption, reference) for reference in references))
    return first, 2 / (1 / first + 1 / second) if first and second else 0.0


def test_formulas_are_the_papers_and_negative_cosines_score_zero() -> None:
    random = np.random.default_rng(0)
    images, captions = random.normal(size=(2, 50, 8))
    counts = random.integers(1, 7, 50)
    references = random.normal(size=(int(counts.sum()), 8))
    scores = clipscore.clip_s(images, captions)
    with_references = clipscore.ref_clip_s(scores, captions, references, counts)
    groups = np.split(references, np.cumsum(counts)[:-1])
    expected = [by_hand(*row[:2], list(row[2])) for row in zip(images, captions, groups, strict=True)]
    np.testing.assert_allclose(np.stack([scores, with_references], axis=1), expected, rtol=1e-12)
    assert 10 < (scores == 0).sum() < 40
    assert (with_references[scores == 0] == 0).all()
    np.testing.assert_allclose(clipscore.clip_s(images, 7 * images), 2.5)
    assert not np.isnan(clipscore.clip_s(images, 0 * captions)).any()


def test_scores_of_a_split_do_not_depend_on_the_batch(
    weights: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipscore, "_BATCH", 3)
    split = Split(packed, "val")
    references = split.references()
    captions = {image_id: f"an image, number {image_id}" for image_id in references}
    clip = clipscore.load(weights, "tiny")
    found = {metric.name: metric for metric in clipscore.measure(split, captions, references, clip)}
    rows = []
    for image_id in sorted(references):
        item = int(np.flatnonzero(split.index["image_id"] == image_id)[0])
        view = clip.preprocess(Image.open(io.BytesIO(split.image(item))).convert("RGB"))
        prompts = ["A photo depicts " + text for text in (captions[image_id], *references[image_id])]
        with torch.inference_mode():
            image = clip.model.encode_image(view[None].to(clip.device)).cpu().double().numpy()[0]
            texts = clip.model.encode_text(clip.tokenizer(prompts).to(clip.device)).cpu().double().numpy()
        rows.append(by_hand(image, texts[0], list(texts[1:])))
    expected = dict(zip(("CLIPScore", "RefCLIPScore"), zip(*rows, strict=True), strict=True))
    for metric, values in expected.items():
        rows = found[metric].statistics([""] * len(values), [])
        np.testing.assert_allclose(rows[:, 0], values, rtol=1e-4, atol=1e-6)
        assert found[metric].corpus_value(rows) == pytest.approx(np.mean(values), abs=1e-5)
        assert found[metric].signature.startswith("clipscore open_clip-")
        assert " tiny sha256=" in found[metric].signature


def test_openais_own_format_gives_the_same_model_and_requires_the_quick_gelu(
    weights: Path, tmp_path: Path
) -> None:
    clip = clipscore.load(weights, "tiny")
    module = torch.nn.Module()
    for name, tensor in clip.model.state_dict().items():
        owner = module
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_buffer(name.rpartition(".")[2], tensor)
    module.register_buffer("input_resolution", torch.tensor(64))
    archive = tmp_path / "OpenAI.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch gives this format up, but OpenAI's files are in it.
        torch.jit.script(module).save(archive)
    same = clipscore.load(archive, "tiny").model.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in clip.model.state_dict().items())
    with pytest.raises(UserError, match="with the quick GELU, but --clip-model tiny-slow is without it"):
        clipscore.load(archive, "tiny-slow")


def test_weights_that_cannot_be_loaded_are_refused(weights: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(weights.read_bytes()[:-1000])
    for file, name, found in [
        (tmp_path / "none.pt", "tiny", "no such file, expected CLIP's weights, which are never downloaded"),
        (tmp_path, "tiny", "a folder, expected"),
        (weights, "tinny", "unknown 'tinny'; did you mean 'tiny'"),
        (weights, "xlm-roberta-base-ViT-B-32", "downloads its tokenizer"),
        (weights, "ViT-B-32", "no weights of ViT-B-32"),
        (damaged, "tiny", "no weights of tiny"),
    ]:
        with pytest.raises(UserError, match=found):
            clipscore.load(file, name)


def test_without_open_clip_the_error_has_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"open_clip: not installed, .* pip install 'captionscale\[clip\]'"):
        clipscore.load(Path("any.pt"))
