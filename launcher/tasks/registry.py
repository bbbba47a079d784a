"""The tasks, by name: plain data, so the command line can list them without importing torch."""

# Files of this folder, each with its `TASK`. If a config names none, the first of these that wants it trains it.
REGISTERED = (
    "label",
    "subject",
    "instruct",
    "text",
    "prefer",
)
