"""tdfx: compresses trained PyTorch networks by tensor decomposition, to a budget, verified.

``compress`` does all of it; ``capture``, ``calibrate``, ``profile``, ``plan``, ``apply`` and ``export_onnx`` are its
stages; ``tune`` trains a result without labels; ``save`` and ``load`` keep results; ``graph`` draws a network;
``bench`` times files.
"""

from tdfx.bench import Bench, BenchRow, bench
from tdfx.budget import Budget
from tdfx.errors import (
    BudgetError,
    CaptureError,
    ExportError,
    InputError,
    OptionError,
    PassError,
    PlanError,
    TdfxError,
    VerificationError,
    WeightError,
)
from tdfx.moments import Moments, SiteMoments
from tdfx.onnx_export import ExportReport, export_onnx
from tdfx.records.candidate import Candidate
from tdfx.records.capture import Capture
from tdfx.records.cost import Cost
from tdfx.records.frontier import Frontier, Point
from tdfx.records.inputs import InputSpec
from tdfx.records.latency import LatencyTable, Measured, Runtime
from tdfx.records.layer import LayerSpec, Site, Skipped
from tdfx.records.network_graph import NetworkGraph
from tdfx.records.plan import Plan
from tdfx.records.profile import Profile
from tdfx.records.result import Report, Result
from tdfx.saving import load, save
from tdfx.stages.apply import apply
from tdfx.stages.calibrate import calibrate
from tdfx.stages.capture import capture
from tdfx.stages.compress import compress
from tdfx.stages.frontier import frontier
from tdfx.stages.graph import graph
from tdfx.stages.latency import measure_latency, with_latency, write_latency_kit
from tdfx.stages.plan import plan
from tdfx.stages.profile import profile
from tdfx.stages.sensitivity import Sensitivity, sensitivity
from tdfx.stages.tune import tune
from tdfx.version import VERSION as __version__

__all__ = [
    "Bench",
    "BenchRow",
    "Budget",
    "BudgetError",
    "Candidate",
    "Capture",
    "CaptureError",
    "Cost",
    "ExportError",
    "ExportReport",
    "Frontier",
    "InputError",
    "InputSpec",
    "LatencyTable",
    "LayerSpec",
    "Measured",
    "Moments",
    "NetworkGraph",
    "OptionError",
    "PassError",
    "Plan",
    "PlanError",
    "Point",
    "Profile",
    "Report",
    "Result",
    "Runtime",
    "Sensitivity",
    "Site",
    "SiteMoments",
    "Skipped",
    "TdfxError",
    "VerificationError",
    "WeightError",
    "__version__",
    "apply",
    "bench",
    "calibrate",
    "capture",
    "compress",
    "export_onnx",
    "frontier",
    "graph",
    "load",
    "measure_latency",
    "plan",
    "profile",
    "save",
    "sensitivity",
    "tune",
    "with_latency",
    "write_latency_kit",
]
