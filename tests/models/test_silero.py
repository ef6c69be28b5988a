"""silero-vad on our LSTM: equal to its own runtimes on real speech, frame by frame, and it obeys the protocol."""

from __future__ import annotations

import runpy
import wave
from pathlib import Path

import pytest
import torch
from torch import Tensor

from statewise import chunked, stream, unroll
from statewise.core import DataError, ResourceError, leaves, read_tensors, write_tensors
from statewise.models.silero import FRAME, SileroVAD, frames
from statewise.tasks.sources import SILERO_VAD, SPEECH, Source, get
from statewise.testing import check_layer

EXAMPLE = Path(__file__).parents[2] / "examples" / "voice_activity.py"

# The weights in the safetensors file are of another training than those in the JIT and ONNX files: the networks
# are the same, so each runtime is compared on its own weights, and the JIT one on the safetensors' too.
JIT_NAMES = {
    "stft.forward_basis_buffer": "stft_conv.weight",
    "decoder.rnn.": "lstm_cell.",
    "decoder.decoder.2.": "final_conv.",
    **{f"encoder.{i}.reparam_conv.": f"conv{i + 1}." for i in range(4)},
}


def files(source: Source) -> dict[str, Path]:
    try:
        get(source)
    except (DataError, ResourceError) as error:
        pytest.skip(str(error))
    return source.paths()


@pytest.fixture(scope="module")
def weights() -> Path:
    return files(SILERO_VAD)["silero_vad_16k.safetensors"]


@pytest.fixture(scope="module")
def speech() -> list[Tensor]:
    """Frames (1, T, 512) of each recording."""
    found = []
    for path in files(SPEECH).values():
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
            signal = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
        found.append(frames(signal[None] / 32768))
    assert len(found) == 5 and sum(x.shape[1] for x in found) == 775
    return found


@pytest.fixture
def jit(weights: Path) -> torch.nn.Module:
    return torch.jit.load(str(files(SILERO_VAD)["silero_vad.jit"]))


def ours(name: str) -> str:
    """The JIT runtime's name of a tensor -> the safetensors file's."""
    prefix = next(p for p in JIT_NAMES if name.startswith(p))
    return JIT_NAMES[prefix] + name.removeprefix(prefix)


def by_jit(jit: torch.nn.Module, x: Tensor) -> Tensor:
    jit.reset_states()
    with torch.no_grad():
        return torch.stack([jit(frame, 16000) for frame in x.unbind(1)], 1)


def by_step(model: SileroVAD, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([y for y, _ in stream(model, x.unbind(1))], 1)


def test_equals_its_own_jit_runtime_with_the_published_safetensors(
    weights: Path, jit: torch.nn.Module, speech: list[Tensor]
) -> None:
    tensors, _ = read_tensors(weights)
    theirs = jit._model.state_dict()
    jit._model.load_state_dict({name: tensors[ours(name)].view(theirs[name].shape) for name in theirs})
    model = SileroVAD.load(weights)
    for x in speech:
        got = by_step(model, x)
        assert (got - by_jit(jit, x)).abs().max() < 1e-5
        assert got.max() > 0.99 and got[:, 0].max() < 0.5  # somebody speaks, not from the first moment


@pytest.fixture
def current(jit: torch.nn.Module, tmp_path: Path) -> SileroVAD:
    """The weights that the package's runtimes use, by way of a safetensors file."""
    tensors = {ours(name): value.contiguous() for name, value in jit._model.state_dict().items()}
    write_tensors(tmp_path / "current.safetensors", tensors)
    return SileroVAD.load(tmp_path / "current.safetensors")


def test_equals_its_own_jit_runtime_with_its_weights(
    current: SileroVAD, jit: torch.nn.Module, speech: list[Tensor]
) -> None:
    for x in speech:
        assert (by_step(current, x) - by_jit(jit, x)).abs().max() < 1e-5


def test_equals_its_own_onnx_runtime(current: SileroVAD, speech: list[Tensor]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(files(SILERO_VAD)["silero_vad_16k_op15.onnx"]))
    for x in speech:
        state, context, answers = torch.zeros(2, 1, 128).numpy(), torch.zeros(1, 64), []
        for frame in x.unbind(1):
            window = torch.cat([context, frame], 1)
            rate = torch.tensor(16000).numpy()
            y, state = session.run(None, {"input": window.numpy(), "state": state, "sr": rate})
            answers.append(torch.from_numpy(y))
            context = window[:, -64:]
        assert (by_step(current, x) - torch.stack(answers, 1)).abs().max() < 1e-5


def test_the_example_prints_every_frame(
    weights: Path, speech: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    path = files(SPEECH)["sense_and_sensibility_01_austen_64kb-0880.wav"]
    runpy.run_path(str(EXAMPLE))["main"](str(path))
    printed = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    want = by_step(SileroVAD.load(weights), speech[1])[0, :-1, 0]  # the last frame is not whole
    assert len(printed) == len(want) == 93
    torch.testing.assert_close(torch.tensor(printed), want, atol=6e-4, rtol=0)


def test_streaming_chunks_and_batch_give_the_same(weights: Path, speech: list[Tensor]) -> None:
    model, x = SileroVAD.load(weights), speech[1]
    with torch.no_grad():
        y, state = model(x)
        assert (by_step(model, x) - y).abs().max() < 1e-5
        pieces, end = chunked(model, x, [10, 0, 1, x.shape[1] - 11])
        assert (pieces - y).abs().max() < 1e-5
        for a, b in zip(leaves(end), leaves(state), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_resets_and_lengths_are_each_recording_alone() -> None:
    model = SileroVAD().double()
    x, lengths = torch.randn(3, 6, FRAME, dtype=torch.float64), torch.tensor([6, 0, 4])
    reset = torch.tensor([[0, 0, 1, 0, 0, 0], [0] * 6, [1, 0, 0, 1, 0, 0]]).bool()
    start = model(x[:, :2])[1]
    got, want = model(x, start, reset=reset, lengths=lengths), unroll(model, x, start, reset=reset, lengths=lengths)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    alone = model(x[:1, 2:])[0]
    torch.testing.assert_close(got[0][:1, 2:], alone, atol=1e-12, rtol=1e-12)


def test_gradients_are_finite_in_silence() -> None:
    x = torch.zeros(1, 3, FRAME, requires_grad=True)
    SileroVAD()(x)[0].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.slow
def test_conforms() -> None:
    report = check_layer(SileroVAD())
    assert report.ok, str(report)


@pytest.fixture(params=["a missing tensor", "a wrong shape", "an unknown tensor"])
def broken(request: pytest.FixtureRequest, weights: Path, tmp_path: Path) -> Path:
    tensors, _ = read_tensors(weights)
    if request.param == "a missing tensor":
        del tensors["lstm_cell.bias_hh"]
    elif request.param == "a wrong shape":
        tensors["conv2.weight"] = tensors["conv2.weight"][:10].contiguous()
    else:
        tensors["conv5.weight"] = torch.zeros(1)
    write_tensors(tmp_path / "broken.safetensors", tensors)
    return tmp_path / "broken.safetensors"


def test_other_weights_are_refused_in_one_line(broken: Path) -> None:
    with pytest.raises(DataError, match=r"broken\.safetensors: not the weights of silero-vad") as caught:
        SileroVAD.load(broken)
    assert "\n" not in str(caught.value)
