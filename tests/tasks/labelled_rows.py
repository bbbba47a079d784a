"""Files of labelled texts, and the settings that read them."""

import json

from launcher.config import DataConfig


def write(folder, rows, name="rows.json"):
    path = folder / name
    path.write_text(json.dumps(rows))
    return str(path)


def config(data, **values):
    return DataConfig(**{"data": data, "text_columns": ("sentence",), "max_length": 48, **values})


def csv_of(folder, *labels, name="rows.csv"):
    path = folder / name
    path.write_text("sentence,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    return str(path)
