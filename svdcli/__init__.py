"""svdcli makes neural-network checkpoints smaller by low rank."""

from svdcli.version import __version__

# Nothing is imported here: the command must catch an interrupt early, and `typing` alone takes
# milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from svdcli.engine.executor import Compute
    from svdcli.errors import SvdcliError
    from svdcli.healing.blocks import Effort
    from svdcli.models.load import load
    from svdcli.plan.plan import Plan
    from svdcli.plan.recipe import Recipe
    from svdcli.text.texts import Texts, read_texts
    from svdcli.verbs.calibrate import calibrate
    from svdcli.verbs.compress import Reading, compress
    from svdcli.verbs.expand import expand
    from svdcli.verbs.export import export_onnx
    from svdcli.verbs.heal import heal
    from svdcli.verbs.inspect import inspect
    from svdcli.verbs.report import report
    from svdcli.verbs.spectrum import spectrum
    from svdcli.verbs.verify import verify

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
    "svdcli.engine.executor": ("Compute",),
    "svdcli.errors": ("SvdcliError",),
    "svdcli.healing.blocks": ("Effort",),
    "svdcli.models.load": ("load",),
    "svdcli.plan.plan": ("Plan",),
    "svdcli.plan.recipe": ("Recipe",),
    "svdcli.text.texts": (
        "Texts",
        "read_texts",
    ),
    "svdcli.verbs.calibrate": ("calibrate",),
    "svdcli.verbs.compress": (
        "Reading",
        "compress",
    ),
    "svdcli.verbs.expand": ("expand",),
    "svdcli.verbs.export": ("export_onnx",),
    "svdcli.verbs.heal": ("heal",),
    "svdcli.verbs.inspect": ("inspect",),
    "svdcli.verbs.report": ("report",),
    "svdcli.verbs.spectrum": ("spectrum",),
    "svdcli.verbs.verify": ("verify",),
}


def __getattr__(name: str) -> object:
    """Import public names when they are first asked for (PEP 562): `import svdcli` itself stays
    instant."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
