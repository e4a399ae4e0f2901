"""svdcli makes neural-network checkpoints smaller by low rank."""

__version__ = "0.1.0"

# Nothing is imported here: the command must catch an interrupt early, and `typing` alone takes milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from svdcli.engine import Compute
    from svdcli.errors import SvdcliError
    from svdcli.files.texts import Texts, read_texts
    from svdcli.healing import Effort, heal
    from svdcli.models.calibrate import calibrate
    from svdcli.models.export import export_onnx
    from svdcli.models.load import load
    from svdcli.pipeline import Reading, compress, expand
    from svdcli.plan.recipe import Plan, Recipe
    from svdcli.survey import inspect, report, spectrum, verify

__all__ = [
    "Compute",
    "Effort",
    "Plan",
    "Reading",
    "Recipe",
    "SvdcliError",
    "Texts",
    "__version__",
    "calibrate",
    "compress",
    "expand",
    "export_onnx",
    "heal",
    "inspect",
    "load",
    "read_texts",
    "report",
    "spectrum",
    "verify",
]

_HOMES = {
    "svdcli.engine": ("Compute",),
    "svdcli.errors": ("SvdcliError",),
    "svdcli.files.texts": ("Texts", "read_texts"),
    "svdcli.healing": ("Effort", "heal"),
    "svdcli.models.calibrate": ("calibrate",),
    "svdcli.models.export": ("export_onnx",),
    "svdcli.models.load": ("load",),
    "svdcli.pipeline": ("Reading", "compress", "expand"),
    "svdcli.plan.recipe": ("Plan", "Recipe"),
    "svdcli.survey": ("inspect", "report", "spectrum", "verify"),
}


def __getattr__(name: str) -> object:
    """Import public names when they are first asked for (PEP 562): `import svdcli` itself stays instant."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
