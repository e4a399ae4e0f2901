"""Values to tables, bars, JSON and CSV; the only room that imports rich."""
