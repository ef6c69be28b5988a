"""Construction: named arguments that, with a state_dict, are the whole layer."""

from __future__ import annotations

import copy
import inspect
import warnings

import torch

from ...core import Cell, RecurrentLayer
from ..check import Skipped, check
from ..sample import BATCH, GUESSES, STEPS, Layer, close, dtype_of, inputs, same_bits, warm


@check("construction")
def check_arguments_are_named(layer: Layer) -> None:
    """The constructor takes named arguments only: they are the configuration."""
    for p in inspect.signature(type(layer).__init__).parameters.values():
        assert p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD), f"the constructor takes *{p.name}: name the arguments"


@check("construction")
def check_arguments_have_types(layer: Layer) -> None:
    """Every constructor argument has a type."""
    bare = [
        p.name for p in list(inspect.signature(type(layer).__init__).parameters.values())[1:] if p.annotation is p.empty
    ]
    assert not bare, f"constructor arguments without a type: {', '.join(bare)}"


@check("construction")
def check_docstring_has_the_recurrence(layer: Layer) -> None:
    """The class's own docstring says the recurrence, as an equation."""
    doc = type(layer).__doc__
    assert doc and doc not in (RecurrentLayer.__doc__, Cell.__doc__), "the class has no docstring of its own"
    assert "=" in doc, "the docstring holds no equation: write the recurrence, h_t = ..."


@check("construction")
def check_widths_are_declared(layer: Layer) -> None:
    """width (or vocab) and out_width are the sizes of x and y."""
    assert layer.vocab or isinstance(getattr(layer, "width", None), int), "the layer sets neither width nor vocab"
    assert isinstance(getattr(layer, "out_width", None), int), "the layer does not set out_width"
    y, _ = layer(inputs(layer))
    assert y.shape == (BATCH, STEPS, layer.out_width), f"y has shape {tuple(y.shape)}, out_width is {layer.out_width}"
    y, _ = layer.step(inputs(layer)[:, 0], layer.initial_state(BATCH))
    assert y.shape == (BATCH, layer.out_width), (
        f"from step y has shape {tuple(y.shape)}, out_width is {layer.out_width}"
    )


@check("construction")
def check_one_return_type(layer: Layer) -> None:
    """forward and step always return the pair (y, state)."""
    x, first = inputs(layer), warm(layer)
    for name, got in {
        "forward": layer(x),
        "forward from a state": layer(x, first),
        "step": layer.step(x[:, 0], first),
    }.items():
        assert type(got) is tuple and len(got) == 2, f"{name} returns {type(got).__name__}, expected (y, state)"
        assert isinstance(got[0], torch.Tensor), f"{name} returns a {type(got[0]).__name__} as y"


@check("construction")
def check_signature_of_forward(layer: Layer) -> None:
    """forward takes (x, state=None, *, reset=None, lengths=None); step (x, state); initial_state (batch)."""
    found = inspect.signature(layer.forward).parameters
    for name in ("state", "reset", "lengths"):
        assert name in found, f"forward has no argument {name!r}"
        assert found[name].default is None, f"forward's {name!r} must be None unless given"
    for name in ("reset", "lengths"):
        assert found[name].kind is inspect.Parameter.KEYWORD_ONLY, f"forward's {name!r} must be named in the call"
    required = [p.name for p in inspect.signature(layer.step).parameters.values() if p.default is p.empty]
    assert len(required) == 2, f"step takes {required}, expected (x, state)"


@check("construction")
def check_rebuild(layer: Layer) -> None:
    """Constructor arguments and state_dict determine the layer."""
    twin = type(layer)(**_arguments(layer)).to(dtype_of(layer)).eval()
    twin.load_state_dict(layer.state_dict(), strict=True)
    same_bits(
        twin(inputs(layer))[0], layer(inputs(layer))[0], "rebuilt from arguments and state_dict it is another layer"
    )


@check("construction")
def check_seed_determines_birth(layer: Layer) -> None:
    """Two layers made after the same torch.manual_seed are equal."""
    arguments, made = _arguments(layer), []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            made.append(type(layer)(**arguments).state_dict())
    for name, value in made[0].items():
        same_bits(made[1][name], value, f"made twice from one seed, {name} differs")


@check("construction")
def check_deepcopy(layer: Layer) -> None:
    """A deep copy is the same layer, with parameters of its own."""
    x, twin = inputs(layer), copy.deepcopy(layer)
    same_bits(twin(x)[0], layer(x)[0], "a deep copy is another layer")
    mine, its = {p.data_ptr() for p in layer.parameters() if p.numel()}, {p.data_ptr() for p in twin.parameters()}
    assert not mine & its, "a deep copy shares parameters with its original"


@check("construction")
def check_state_dict_is_stable(layer: Layer) -> None:
    """The keys of the state_dict do not change by running, and it loads strictly."""
    before = list(layer.state_dict())
    layer(inputs(layer))
    layer.step(inputs(layer)[:, 0], layer.initial_state(BATCH))
    assert list(layer.state_dict()) == before, "running the layer changes the keys of its state_dict"
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(layer.state_dict(), strict=True)
    same_bits(twin(inputs(layer))[0], layer(inputs(layer))[0], "a state_dict does not bring back the layer")


@check("construction")
def check_dtype_round_trip(layer: Layer) -> None:
    """To float32 and back to float64, the layer works and is what it was to 1e-4."""
    x, want = inputs(layer), layer(inputs(layer))[0]
    back = copy.deepcopy(layer).float().double()
    close(back(x)[0], want, "to float32 and back it is another layer", 1e-4)


@check("construction")
def check_birth_in_default_dtype(layer: Layer) -> None:
    """Made under torch.set_default_dtype(float64), the layer runs in float64."""
    arguments, before = _arguments(layer), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        born = type(layer)(**arguments).eval()
        x = inputs(born)
        assert layer.vocab or x.dtype == torch.float64, f"made under float64 the parameters are {x.dtype}"
        born(x)
        born.step(x[:, 0], born.initial_state(BATCH))
    finally:
        torch.set_default_dtype(before)


@check("construction")
def check_sizes_are_refused(layer: Layer) -> None:
    """Sizes of 0 and -1 raise ValueError from the constructor, and name the argument."""
    arguments = _arguments(layer)
    sizes = [name for name, value in arguments.items() if name in GUESSES and isinstance(value, int)]
    if not sizes:
        raise Skipped("no constructor argument is known as a size")
    for name in sizes:
        for value in (0, -1):
            what = f"{type(layer).__name__}({name}={value})"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's about tensors without elements
                    type(layer)(**{**arguments, name: value})
            except ValueError as error:
                assert str(value) in str(error), f"{what}: the message does not say {value}: {error}"
            except Exception as error:
                raise AssertionError(f"{what} raises {type(error).__name__}: {error}; expected ValueError") from error
            else:
                raise AssertionError(f"{what} is accepted; expected ValueError")


def _arguments(layer: Layer) -> dict:  # type: ignore[type-arg]
    arguments = layer.__dict__.get("example")
    if arguments is None:
        raise Skipped("the constructor arguments are not known: check the class with example={...}")
    return copy.deepcopy(arguments)
