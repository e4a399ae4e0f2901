"""The disk: headers, checkpoints, records, reports, and writing that can be resumed."""
