"""How one job is done and where, what a run is to do, and how its results become an output."""
