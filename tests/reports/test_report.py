"""The report of a run: what it shows, of one run and of several, of damaged files, and in a browser."""

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher import cli
from launcher.files import weights_digest
from launcher.reports.commands import _content, _Page, write_report
from launcher.reports.figures import binned, curves, moving_mean, png, short_names, svg, thinned
from launcher.reports.page import largest_movers, overview, report, score_table
from launcher.reports.read import NotBegun, layer_of, layer_order, module_of, read_run
from launcher.text import UNSAFE

MODULES = ("self_attn.q_proj", "mlp.up_proj")


def write_run(folder, method="loldu", rank=6, steps=30, **adapter_config):
    """A run folder as training leaves it, with cores 0.01 x their place and values of 2."""
    (folder / "adapter").mkdir(parents=True)
    config = {
        "model": {"model": "base"},
        "data": {"data": "records.json"},
        "adapter": {"method": method, "rank": rank},
        "run": {"output": str(folder)},
    }
    (folder / "config.json").write_text(
        json.dumps({"config": config, "resolved": {"steps": steps, "trained": 4 * rank}, "identity": {}})
    )
    (folder / "state").write_text("finished\n")
    events = [{"step": 0, "eval_loss": 2.0}]
    for step in range(1, steps + 1):
        events.append({"step": step, "loss": 2.0 - step / 40, "lr": 0.1, "grad_norm": 0.5, "tokens": 64})
    events.append({"step": steps, "eval_loss": 1.25})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    tensors = {}
    for layer in range(2):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.{module}.{method}_map"
            tensors[f"{name}.core"] = (np.arange(rank) * 0.01 * (1 + layer)).astype(np.float32)
            tensors[f"{name}.values"] = np.full(rank, 2.0, np.float32)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"scale": 1.0, **adapter_config}))
    return folder


def test_a_report_is_one_file_with_curves_trained_numbers_and_settings(tmp_path):
    file = write_report([write_run(tmp_path / "run")])

    html = file.read_text()
    assert file == tmp_path / "run" / "report.html"
    assert html.count("<svg") == 5  # loss, learning rate, gradient norm, held-out loss, trained numbers
    assert "held-out loss 2.0000 at step 0, 1.2500 at step 30" in html
    assert "24 numbers in 4 modules" in html
    assert "records.json" in html
    assert "http" not in html.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http-equiv", ""
    ).replace("http://purl.org", "").replace("http://creativecommons.org", "")  # nothing is loaded from elsewhere
    pictures = sorted(path.name for path in (tmp_path / "run" / "report").iterdir())
    assert pictures == [
        "gradient_norm.png", "held_out_loss.png", "learning_rate.png", "loss.png", "trained_numbers.png"
    ]  # fmt: skip


def test_changes_are_relative_to_the_modules_largest_frozen_value(tmp_path):
    run = read_run(write_run(tmp_path / "run", scale=3.0))

    [first, *_] = [change for change in run.changes if change.layer == "1"]
    assert np.allclose(first.change, 3.0 * np.arange(6) * 0.02 / 2.0)
    assert run.unit == "relative to the module's largest frozen value"


def test_changes_of_normalised_directions_are_relative_to_the_largest(tmp_path):
    run = read_run(write_run(tmp_path / "run", normalize_directions=True))

    assert max(change.change.max() for change in run.changes) == 1.0
    assert run.unit.startswith("relative to the largest change (0.1")


def test_the_largest_movers_are_named_with_their_module_and_place(tmp_path):
    movers = largest_movers(read_run(write_run(tmp_path / "run")))

    assert [(module, place) for module, place, _ in movers[:2]] == [
        ("model.layers.1.mlp.up_proj", 5),
        ("model.layers.1.self_attn.q_proj", 5),
    ]
    assert len(movers) == 10


def test_several_runs_are_compared_and_only_settings_that_differ_are_listed(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", rank=8)]

    file = write_report(runs)

    html = file.read_text()
    assert file == tmp_path / "report.html"
    table = html[html.index("Settings that differ") :]
    assert "adapter.rank" in table
    assert "data.data" not in table
    assert "run.output" not in table


def test_several_runs_share_one_legend_outside_the_curves(tmp_path):
    """The page's table of runs has their colours, and each PNG has the names below its axes."""
    runs = [read_run(write_run(tmp_path / f"run-{number}")) for number in range(9)]

    figure = curves(runs)["Loss"]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    high = figure.get_figheight()
    assert figure.axes[0].get_legend() is None
    assert len(png(figure)) > 10_000
    picture = svg(figure)

    assert named == [f"run-{number}" for number in range(9)]
    assert "run-3" not in picture
    assert figure.get_figheight() < high
    html = report(runs).html
    assert html.count('class="swatch"') == 9
    assert html.count("border-top-style: dashed") == 1  # the ninth, which has the colour of the first


def test_a_run_of_one_step_has_points_that_are_seen(tmp_path):
    figure = curves([read_run(write_run(tmp_path / "run", steps=1))])["Loss"]

    [line] = figure.axes[0].lines
    assert line.get_marker() == "o"
    assert figure.axes[0].get_xlim() == (0.0, 2.0)


def test_a_long_run_is_drawn_with_few_points_and_its_peaks():
    points = [(step, 1.0) for step in range(50_000)]
    points[31_111] = (31_111, 9.0)
    points[31_112] = (31_112, -9.0)

    few = thinned(points)

    assert len(few) <= 1000
    assert points[31_111] in few
    assert points[31_112] in few
    assert few == sorted(few)
    assert thinned(points[:1000]) == points[:1000]


def test_a_method_whose_start_is_not_stored_has_no_map_and_the_page_tells_why(tmp_path):
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "adapter")

    assert "does not start at known values" in report([read_run(folder)]).html


def test_control_characters_of_a_run_are_escaped(tmp_path):
    folder = write_run(tmp_path / "run")
    answers = [{"step": 0, "question": "\x1b[2Jq", "expected": "x\u202e", "answer": "\x1b]0;owned\x07"}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))

    html = report([read_run(folder)]).html

    assert not UNSAFE.search(html)
    assert r"\x1b[2Jq" in html
    assert "<svg" in html or "data:image" in html


def test_text_of_a_run_is_never_markup(tmp_path):
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["config"]["data"]["data"] = "<script>alert(1)</script>"
    (folder / "config.json").write_text(json.dumps(config))
    answers = [{"step": step, "question": "<b>q</b>", "expected": "x", "answer": "</table>"} for step in (0, 30)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))

    html = report([read_run(folder)]).html

    assert "<script" not in html
    assert "<b>q" not in html
    assert "&lt;b&gt;q&lt;/b&gt;" in html
    assert "<th>step 30</th>" in html


@pytest.mark.parametrize(
    "damage",
    [
        '{"step": 31, "lo',
        "[1, 2]",
        '{"step": "x", "loss": 1}',
        '{"step": 31, "loss": NaN}',
        '{"step": true, "loss": 1}',
        "\x00",
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_left_out(tmp_path, damage):
    folder = write_run(tmp_path / "run")
    with open(folder / "events.jsonl", "a") as file:
        file.write(damage + "\n")

    assert [step["step"] for step in read_run(folder).steps] == list(range(1, 31))


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    (folder / "events.jsonl").unlink()

    assert "No step is recorded yet" in write_report([folder]).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--watch", "--port", "99999"], "--port lies between 0 (any free one) and 65535, got 99999"),
        (["--watch", "--out", "x.html"], "--watch serves the report and writes no file: leave --out x.html"),
    ],
)
def test_settings_of_watch_that_cannot_be_are_refused(words, message, tmp_path, capsys):
    assert cli.main(["report", str(write_run(tmp_path / "run")), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_run_is_shown_with_its_last_error(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "state").write_text("failed\n")
    killed = write_report([folder]).read_text()
    (folder / "error").write_text("<b>no space</b> is left\n")

    alone = write_report([folder]).read_text()
    several = write_report([folder, write_run(tmp_path / "other")]).read_text()
    (folder / "state").write_text("running\n")
    begun_again = write_report([folder]).read_text()

    assert "<strong>failed:</strong> it left no reason" in killed
    assert "<strong>failed:</strong> &lt;b&gt;no space&lt;/b&gt; is left" in alone
    assert "<strong>run failed:</strong> &lt;b&gt;no space" in several
    assert "no space" not in begun_again


def test_a_run_that_has_no_settings_yet_is_told_from_a_folder_of_something_else(tmp_path):
    (tmp_path / ".owner-000001").touch()
    with pytest.raises(NotBegun, match="does not train yet"):
        read_run(tmp_path)
    (tmp_path / "state").write_text("failed\n")
    (tmp_path / "error").write_text("record 7 is empty\n")
    with pytest.raises(NotBegun, match="failed before it trained a step: record 7 is empty"):
        read_run(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not a run folder"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": []}', '{"config": {"adapter": 1}}', "[" * 100_000])
def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    code = cli.main(["report", str(tmp_path)])

    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_command_prints_where_the_report_is(tmp_path, capsys):
    code = cli.main(["report", str(write_run(tmp_path / "run")), "--out", str(tmp_path / "other.html")])

    assert code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "other.html")
    assert (tmp_path / "other.html").exists()


def test_a_served_report_follows_the_run_and_answers_local_names_alone(tmp_path):
    folder = write_run(tmp_path / "run", steps=5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Page, [folder]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        before = urllib.request.urlopen(address, timeout=20).read().decode()
        with open(folder / "events.jsonl", "a") as file:
            file.write('{"step": 6, "loss": 0.75}\n')
        after = urllib.request.urlopen(address, timeout=20).read().decode()
        foreign = urllib.request.Request(address, headers={"Host": "evil.example:80"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign, timeout=20)
    finally:
        server.shutdown()
        server.server_close()

    assert "step 5 of 5" in before
    assert 'http-equiv="refresh"' in before
    assert "step 6 of 5, loss 0.7500" in after


def test_a_report_is_served_from_before_a_run_has_settings_and_by_several_requests_at_once(tmp_path):
    """The page is loaded again until there is one, and drawn by one request at a time: matplotlib has one style."""
    folder = tmp_path / "run"
    folder.mkdir()

    before = _content([folder]).decode()
    folder.rmdir()
    write_run(folder, steps=5)
    with ThreadPoolExecutor(3) as pool:
        pages = set(pool.map(lambda _: _content([folder]), range(6)))

    assert "does not train yet" in before
    assert 'http-equiv="refresh"' in before
    assert len(pages) == 1


def test_a_cell_of_the_map_shows_the_largest_of_its_numbers():
    assert binned(np.array([0.1, -0.9, 0.3, 0.2]), 2).tolist() == [-0.9, 0.3]
    assert np.isnan(binned(np.array([1.0]), 2)).tolist() == [False, True]


def test_the_moving_mean_is_the_mean_of_the_last_values():
    assert moving_mean([1.0, 2.0, 6.0, 4.0], 2).tolist() == [1.0, 1.5, 4.0, 5.0]


def test_a_tensor_belongs_to_the_base_models_module():
    assert module_of("base_model.model.model.layers.3.mlp.up_proj.loldu_map.core") == "model.layers.3.mlp.up_proj"
    assert module_of("base_model.model.lm_head.lora_B.weight") == "lm_head"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dark"), [((1200, 1400), False), ((1200, 1400), True), ((400, 1400), False)])
def test_the_page_fits_a_browser_light_and_dark_wide_and_narrow(tmp_path, size, dark):
    """Headless Chromium: nothing is wider than the window, and text and background differ."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    file = write_report([write_run(tmp_path / "run")])
    # the page forbids scripts: this copy allows them, to measure the page
    html = file.read_text().replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    probe = (
        "<script>document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth,"
        " getComputedStyle(document.querySelector('figure svg')).color])</script></body>"
    )
    (tmp_path / "probed.html").write_text(html.replace("</body>", probe))
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []

    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", *scheme, f"--window-size={size[0]},{size[1]}",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'probed.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    title = done.stdout[done.stdout.index("<title>") + 7 : done.stdout.index("</title>")]
    needed, there, colour = json.loads(title)
    assert needed <= there
    assert (colour == "rgb(255, 255, 255)") == dark


def test_scores_of_loldu_eval_are_in_the_report(tmp_path):
    """A row for each metric, base and adapter side by side; damaged parts are left out."""
    write_run(folder := tmp_path / "run")
    score = {"value": 0.8125, "stderr": 0.0101, "n": 1490}
    tasks = {"arc_easy": {"scores": {"base": {"acc": score}, "adapter": {"acc": {**score, "value": 0.9}}}}}
    (folder / "eval.json").write_text(json.dumps({"tasks": {**tasks, "damaged": {"scores": 3}}}))

    page = report([read_run(folder)]).html

    assert "<td>arc_easy</td><td>acc</td><td>0.8125 ± 0.0101</td><td>0.9000 ± 0.0101</td>" in page
    assert "damaged" not in page


def test_scores_of_other_weights_or_settings_are_shown_as_such(tmp_path):
    """The adapter is replaced after it was evaluated; a copy of the folder changes nothing."""
    folder = write_run(tmp_path / "run")
    score = {"value": 0.8125, "stderr": None, "n": 4}
    on = {"weights": weights_digest(folder / "adapter"), "dtype": "float32", "quantize": "nf4", "records": "ab" * 32}

    def entry(**other):
        return {"limit": None, "measured": on | other, "scores": {"base": {"acc": score}, "adapter": {"acc": score}}}

    tasks = {"data": entry(), "old": {"scores": {"adapter": {"acc": score}}}}
    (folder / "eval.json").write_text(json.dumps({"tasks": tasks}))
    shutil.copytree(folder, copy := tmp_path / "copy")
    other = write_run(tmp_path / "other")
    (other / "eval.json").write_text(json.dumps({"tasks": {"data": entry(dtype="bfloat16")}}))

    present = read_run(copy).scores
    rows = [row[0] for row in score_table([read_run(folder), read_run(other)])["rows"]]
    (folder / "adapter" / "adapter_config.json").write_text('{"scale": 2.0}')
    replaced = report([read_run(folder)]).html

    name = "data (float32, nf4, records abababab)"
    assert {task: list(models) for task, models in present.items()} == {
        name: ["base", "adapter"], "old": ["adapter, not recorded which"],
    }  # fmt: skip
    assert rows == [name, "old", name.replace("float32", "bfloat16")]  # never side by side in one row
    assert "<th>base</th><th>other adapter</th><th>adapter, not recorded which</th>" in replaced
    assert "that the run folder does not hold now" in replaced


def test_losses_on_other_held_out_records_are_never_compared(tmp_path):
    runs = []
    for name, digests in (("one", "abb"), ("two", "aac")):
        folder = write_run(tmp_path / name)
        lines = [
            {"step": step, "eval_loss": 3.0 - step, "held_out": digest * 64} for step, digest in enumerate(digests)
        ]
        (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(read_run(folder))

    both, alone = report(runs).html, report(runs[:1]).html

    assert overview(runs[0])[-1] == "2.0000 → 1.0000"  # both of b
    assert overview(runs[1])[-1] == "1.0000"
    assert "held-out loss 2.0000 at step 1, 1.0000 at step 2" in alone
    assert "one: the held-out records changed during the run" in alone
    assert "evaluated on different held-out records" in both
    assert "evaluated on different" not in alone
    (tmp_path / "two" / "events.jsonl").write_text('{"step": 0, "eval_loss": 1.0, "held_out": [1]}\n')
    assert "Held-out loss" in report([runs[0], read_run(tmp_path / "two")]).html  # damaged
    [line] = curves(runs[:1])["Held-out loss"].axes[0].lines
    assert list(np.isnan(line.get_ydata())) == [False, True, False, False]  # drawn apart


def test_the_map_of_a_unet_has_a_row_for_each_block_and_of_other_models_for_each_layer():
    blocks = ["up_blocks.1.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0",
              "down_blocks.0.attentions.1.transformer_blocks.0"]  # fmt: skip
    found = [layer_of(f"{block}.attn2.to_out.0") for block in blocks]

    assert found == [(layer, "attn2.to_out.0") for layer in ("up 1.0.0", "mid 0.0", "down 0.1.0")]
    assert sorted(["up 1.0.0", "mid 0.0", "down 0.1.0"], key=layer_order) == ["down 0.1.0", "mid 0.0", "up 1.0.0"]
    assert layer_of("model.layers.11.mlp.experts.3.up_proj") == ("11", "mlp.experts.3.up_proj")
    assert sorted(["11", "2", ""], key=layer_order) == ["", "2", "11"]
    assert layer_of("lm_head") == ("", "lm_head")


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (["self_attn.q_proj", "mlp.up_proj"], ["q_proj", "up_proj"]),
        (["attn1.to_out.0", "attn2.to_out.0"], ["attn1.to_out.0", "attn2.to_out.0"]),
        (["attn1.to_out.0", "attn1.to_q"], ["to_out.0", "to_q"]),
        (["attention.output.dense", "output.dense"], ["attention.output.dense", "output.dense"]),
    ],
)
def test_the_names_below_the_map_tell_its_modules_apart(parts, names):
    assert short_names(parts) == names


def test_numbers_that_the_map_does_not_have_are_counted(tmp_path):
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["resolved"]["trained"] = 30
    (folder / "config.json").write_text(json.dumps(config))

    html = report([read_run(folder)]).html

    assert "6 further trained numbers are not shown" in html
    assert "Every trained number" not in html


def test_speed_is_counted_in_what_the_task_counts_and_only_text_has_padding(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens_per_s": 3.0, "padding": 0.0}\n')
    text = read_run(folder)
    pictures = replace(text, resolved=text.resolved | {"counts": "patches"})

    assert list(curves([text]))[-2:] == ["Tokens per second", "Padding (share of positions)"]
    assert list(curves([pictures]))[-1] == "Patches per second"
    assert "Patches or tokens per second" in curves([text, pictures])
