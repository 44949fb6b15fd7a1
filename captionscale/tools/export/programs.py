"""Export parts of a captioner with ONNX or torch.export, and load them back."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from captionscale.tools.export.parts import Part, Run


def write_onnx(part: Part, folder: Path, batch: int | None) -> Run:
    """Write a part as `NAME.onnx`, and return a function that runs it with ONNX Runtime.

    Args:
        part: In evaluation mode.
        folder: An existing one.
        batch: Fixed batch size; None: any.
    """
    import onnxruntime

    path = folder / f"{part.name}.onnx"
    with _quiet():
        program = torch.onnx.export(
            part.module,
            (tuple(part.inputs.values()),),
            input_names=[*part.inputs],
            output_names=[*part.outputs],
            dynamic_shapes=_shapes(part, batch),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        # program.save raises an undocumented error on a full disk.
        path.write_bytes(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        named = {name: each.numpy() for name, each in zip(part.inputs, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run([*part.outputs], named)]

    return run


def write_torch(part: Part, folder: Path, batch: int | None) -> Run:
    """Write a part with torch.export, and return a function that runs it; as `write_onnx`."""
    path = folder / f"{part.name}.pt2"
    with _quiet():
        program = torch.export.export(
            part.module, (tuple(part.inputs.values()),), dynamic_shapes=_shapes(part, batch), strict=False
        )
        written = io.BytesIO()
        torch.export.save(program, written)
        # torch.export.save raises a RuntimeError on a full disk.
        path.write_bytes(written.getbuffer())
        module = torch.export.load(path).module()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(tuple(inputs)))

    return run


def _shapes(part: Part, batch: int | None) -> tuple[tuple[dict[int, object], ...]] | None:
    """Return the dynamic dimensions: the batch of each input."""
    if batch is not None:
        return None
    size = torch.export.Dim("batch", min=1, max=4096)
    return (tuple({0: size} for _ in part.inputs),)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        # Warnings about PyTorch's internals; the result is checked.
        warnings.simplefilter("ignore")
        yield
