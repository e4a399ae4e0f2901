"""svdcli makes neural-network checkpoints smaller by low rank."""

from svdcli.version import __version__

# Nothing is imported here: the command must catch an interrupt early, and `typing` alone takes
# milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from svdcli.calibration.work import Forecast
    from svdcli.engine.compute import Compute
    from svdcli.errors import SvdcliError
    from svdcli.files.report import Report
    from svdcli.healing.blocks import Effort
    from svdcli.models.load import load
    from svdcli.plan.plan import Plan
    from svdcli.plan.recipe import Recipe
    from svdcli.text.texts import Texts, read_texts
    from svdcli.verbs.bench import Bench, bench
    from svdcli.verbs.calibrate import Calibrated, calibrate
    from svdcli.verbs.compress import Reading, compress
    from svdcli.verbs.evaluate import Evaluation, evaluate
    from svdcli.verbs.expand import expand
    from svdcli.verbs.export import Exported, export_onnx
    from svdcli.verbs.heal import heal
    from svdcli.verbs.inspect import Inspection, inspect
    from svdcli.verbs.merge_moments import merge_moments
    from svdcli.verbs.outcome import Outcome
    from svdcli.verbs.report import report
    from svdcli.verbs.spectrum import Spectrum, spectrum
    from svdcli.verbs.verify import Verification, verify

__all__ = [
    "Bench",
    "Calibrated",
    "Compute",
    "Effort",
    "Evaluation",
    "Exported",
    "Forecast",
    "Inspection",
    "Outcome",
    "Plan",
    "Reading",
    "Recipe",
    "Report",
    "Spectrum",
    "SvdcliError",
    "Texts",
    "Verification",
    "__version__",
    "bench",
    "calibrate",
    "compress",
    "evaluate",
    "expand",
    "export_onnx",
    "heal",
    "inspect",
    "load",
    "merge_moments",
    "read_texts",
    "report",
    "spectrum",
    "verify",
]

_HOMES = {
    "svdcli.calibration.work": ("Forecast",),
    "svdcli.engine.compute": ("Compute",),
    "svdcli.errors": ("SvdcliError",),
    "svdcli.files.report": ("Report",),
    "svdcli.healing.blocks": ("Effort",),
    "svdcli.models.load": ("load",),
    "svdcli.plan.plan": ("Plan",),
    "svdcli.plan.recipe": ("Recipe",),
    "svdcli.text.texts": ("Texts", "read_texts"),
    "svdcli.verbs.bench": ("Bench", "bench"),
    "svdcli.verbs.calibrate": ("Calibrated", "calibrate"),
    "svdcli.verbs.compress": ("Reading", "compress"),
    "svdcli.verbs.evaluate": ("Evaluation", "evaluate"),
    "svdcli.verbs.expand": ("expand",),
    "svdcli.verbs.export": ("Exported", "export_onnx"),
    "svdcli.verbs.heal": ("heal",),
    "svdcli.verbs.inspect": ("Inspection", "inspect"),
    "svdcli.verbs.merge_moments": ("merge_moments",),
    "svdcli.verbs.outcome": ("Outcome",),
    "svdcli.verbs.report": ("report",),
    "svdcli.verbs.spectrum": ("Spectrum", "spectrum"),
    "svdcli.verbs.verify": ("Verification", "verify"),
}


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return __all__


def __getattr__(name: str) -> object:
    """Import public names when they are first asked for (PEP 562): `import svdcli` itself stays
    instant."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
