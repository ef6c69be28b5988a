"""Models out of the laboratory: one step as ONNX or torch.export, and weights that stream at the speed of memory."""

from .export import export_step, state_names
from .recorded import RecordedStep
from .weights import Kind, StreamedWeight, for_streaming

__all__ = ["Kind", "RecordedStep", "StreamedWeight", "export_step", "for_streaming", "state_names"]
