"""From argv to one call and one rendering; the only room that imports typer."""
