"""Arguments and options that several commands share, each said once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from tdfx.onnx_export import LEAST_OPSET
from tdfx.planner import planners
from tdfx.records.capture import AUTO, EXPORT, FX, INPLACE
from tdfx.records.plan import MOST_SEED


class Verify(str, Enum):
    """What is verified."""

    PLAN = "plan"
    FULL = "full"


class Captured(str, Enum):
    """How the model is captured."""

    AUTO = AUTO
    FX = FX
    EXPORT = EXPORT
    INPLACE = INPLACE


class Guarded(str, Enum):
    """What keeps slower layers out."""

    ESTIMATED = "estimated"
    MEASURED = "measured"


class Quantized(str, Enum):
    """Number formats that ONNX files can be quantized to."""

    INT8 = "int8"


GUARD_HELP = "measured: choices are timed in ONNX Runtime, and a network that is no faster is refused."
MODEL_HELP = "package.module:factory, file.py:factory, or a file.pt2 of torch.export.save."
INPUT_HELP = (
    "1x3x224x224, or input_ids=2x128:int64 for a keyword; one for each argument. A .pt2 file's own if left out."
)
BUDGET_HELP = 'For example "flops=50%", "params=2M,flops=1.2G" or "latency=12ms".'
RANKS_HELP = "Instead of a budget: vbmf, energy=0.95, ratio=0.33 or compression=75%, with one method."
CACHE_HELP = 'Keeps errors between runs; ~/.cache/tdfx if left out, "none" for no cache.'
METRIC_HELP = "Of the errors: loss with --data, weight:relative without; or feature, weight, each :absolute or :scaled."
DATA_HELP = "Unlabeled inputs: .npy, .npz, .pt, a folder of images, or package.module:function or file.py:function."
CORRECT_HELP = "Give the outputs of compressed layers their mean back, and with --data their spread."
QUANTIZE_HELP = "Also write model.int8.onnx: calibrated on --data; without, ranges are found anew in every run."
RTOL_HELP = "Most that outputs may differ, of the largest: the int8 file's with --quantize, else the float32 one's."
SESSION_CONFIG_HELP = (
    "Of ONNX Runtime's session, as session.intra_op.allow_spinning=0, enable_cpu_mem_arena=0, provider.NAME=x."
)
CAPTURE_HELP = "fx: symbolic tracing, export: torch.export, inplace: no graph, the model's Python code stays."
DYNAMIC_HELP = "Sizes that stay free besides the batch's, e.g. input_ids:1=sequence; one for each dimension."
FIXED_HELP = "The ONNX file takes the inputs' batch size only; for models that compute with no other."

Model = Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)]
Inputs = Annotated[list[str] | None, Option("--input", metavar="[NAME=]SHAPE[:DTYPE]", help=INPUT_HELP)]
Weights = Annotated[Path | None, Option(metavar="FILE", help="State dict, .pt or .safetensors.")]
Budget = Annotated[str | None, Option(metavar="BUDGET", help=BUDGET_HELP)]
Ranks = Annotated[str | None, Option(metavar="RULE", help=RANKS_HELP)]
Methods = Annotated[str | None, Option(metavar="A,B", help="Methods to choose from; all if left out.")]
Include = Annotated[list[str] | None, Option(metavar="GLOB", help="Only layers of such names.")]
Exclude = Annotated[list[str] | None, Option(metavar="GLOB", help="No layers of such names.")]
Metric = Annotated[str | None, Option(help=METRIC_HELP)]
Data = Annotated[str | None, Option(metavar="DATA", help=DATA_HELP)]
Samples = Annotated[int | None, Option(min=1, help="Of --data; all if left out.")]
Mean = Annotated[str | None, Option(metavar="A,B,C", help="By channel, of a folder of images; 0 if left out.")]
Std = Annotated[str | None, Option(metavar="A,B,C", help="By channel, of a folder of images; 1 if left out.")]
Output = Annotated[str, Option(help="What the model returns: logits, values, or auto to decide by shape.")]
Correct = Annotated[bool, Option("--correct/--no-correct", help=CORRECT_HELP)]
Planner = Annotated[str, Option(help=f"What chooses methods and ranks: {' or '.join(planners())}.")]
Guard = Annotated[Guarded, Option(help=GUARD_HELP)]
Latency = Annotated[
    Path | None, Option(metavar="LATENCY.JSON", help="What tdfx latency or a latency kit measured; else estimates.")
]
Threads = Annotated[int, Option(min=1, help="Of ONNX Runtime, where latency is measured.")]
Provider = Annotated[str, Option(help="Execution provider of ONNX Runtime, where latency is measured.")]
SessionConfig = Annotated[list[str] | None, Option(metavar="KEY=VALUE", help=SESSION_CONFIG_HELP)]
Target = Annotated[str, Option(help='Runtime the result is meant for, a file of latency-fit, or "none".')]
RankMultiple = Annotated[int | None, Option(help="Grid of ranks, 1: any; if left out the target's, or 1 with --ranks.")]
Trainable = Annotated[bool, Option("--trainable", help="Keep BatchNorm and Dropout for fine-tuning.")]
Capture = Annotated[Captured, Option(help=CAPTURE_HELP)]
Verification = Annotated[Verify, Option(help="full: also every method at full rank on every layer.")]
Seed = Annotated[int, Option(min=0, max=MOST_SEED, help="Of example inputs and decompositions.")]
CacheDir = Annotated[str | None, Option(metavar="DIR", help=CACHE_HELP)]
Opset = Annotated[int | None, Option(min=LEAST_OPSET, help="ONNX operator set; torch's if left out.")]
FixedBatch = Annotated[bool, Option("--fixed-batch", help=FIXED_HELP)]
Dynamic = Annotated[list[str] | None, Option("--dynamic", metavar="INPUT:DIM=NAME", help=DYNAMIC_HELP)]
Rtol = Annotated[float | None, Option(help=RTOL_HELP)]
Quantize = Annotated[Quantized | None, Option(help=QUANTIZE_HELP)]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
