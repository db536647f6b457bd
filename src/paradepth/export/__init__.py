"""Export: models as ONNX files, as programs of torch.export and compiled by AOTInductor, each compared with PyTorch."""

from paradepth.export.aoti import export_aoti, load_aoti
from paradepth.export.files import Exported
from paradepth.export.onnx_file import export_onnx
from paradepth.export.program import export_program, load_program
from paradepth.export.run import export_run
from paradepth.export.runtime import OnnxModel
from paradepth.export.verify import ExportMismatch, Verification

__all__ = [
    "ExportMismatch",
    "Exported",
    "OnnxModel",
    "Verification",
    "export_aoti",
    "export_onnx",
    "export_program",
    "export_run",
    "load_aoti",
    "load_program",
]
