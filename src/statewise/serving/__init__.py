"""Models out of the laboratory: one step as ONNX or torch.export, and weights that stream at the speed of memory."""

from .export import export_step, state_names
from .recorded import RecordedStep
from .weights import StreamedWeight, for_streaming

__all__ = ["RecordedStep", "StreamedWeight", "export_step", "for_streaming", "state_names"]
