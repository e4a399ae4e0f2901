"""Help texts whose options are grouped, as plain text: Typer groups them only in boxes that Rich
draws, which a pipe or a narrow terminal makes hard to read."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

PANELS = ("Target", "Calibration", "Text", "Storage", "Selection", "Run", "Output")
_ORDER = ("Arguments", "Options", *PANELS)


class PanelledCommand(TyperCommand):
    """A command that lists its options panel by panel; what lies in none is its own, and comes
    first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        # Every option into its panel, in the order of the command's parameters
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in _ORDER}
        for parameter in self.get_params(ctx):
            shown = parameter.get_help_record(ctx)
            if shown is not None:
                panels[_panel_of(parameter)].append(shown)
        for panel, lines in panels.items():
            if lines:
                with formatter.section(panel):
                    formatter.write_dl(lines)


def _panel_of(parameter: Any) -> str:
    """Where an option or argument is listed; `--help` is click's own, and has no panel."""
    if parameter.param_type_name == "argument":
        return "Arguments"
    if parameter.name == "help":
        return PANELS[-1]
    return getattr(parameter, "rich_help_panel", None) or "Options"
