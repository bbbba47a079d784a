"""The image recipe: its embedded model and digits, and the settings of the published run."""

import json
import sys
from pathlib import Path

import pytest

from launcher import start

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
from vit_images_loldu import tiny, vit_images


@pytest.mark.slow  # 12 s of processor time
def test_the_embedded_model_learns_digits_that_its_pretraining_did_not_show(tmp_path, capfd):
    options = ["--tiny", "--max-steps", "120", "--output", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]

    code = start.run_recipe("vit_images_loldu", vit_images, tiny, options)

    assert code == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    before, after = (event["accuracy"] for event in events if "accuracy" in event)
    assert before < 0.3
    assert after > 0.75
    out = capfd.readouterr().out
    assert "1,197 images labelled with 10 classes" in out
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_the_published_run_trains_a_new_head_and_full_rank_cores():
    config = vit_images()

    assert config.data.image_column == "image"
    assert config.adapter.modules_to_save == ("classifier",)
    assert (config.adapter.rank, config.optimizer.batch_size, config.optimizer.epochs) == (768, 128, 10)
