"""The text of job.sbatch: compared with golden files, and quoting of hostile values. Needs no Slurm."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster import slurm, slurm_jobs, slurm_status
from launcher.cluster.commands import split_recipe_options
from launcher.cluster.slurm import Job, Resources, clean_environment, script
from launcher.cluster.slurm_jobs import JobState, parse_sacct, parse_scontrol

GOLDEN = Path(__file__).with_name("golden")
REPO = Path(__file__).resolve().parents[2]
JOB = Job(
    name="alpaca-64",
    run="/data/runs/alpaca-64",
    folder="/home/me/project",
    command=("/home/me/project/recipes/llama2_alpaca_loldu.py", "--rank=64", "--output=/data/runs/alpaca-64"),
    resources=Resources(
        nodes=2, gpus_per_node=8, cpus_per_task=12, time="24:00:00", partition="gpu", account="nlp",
        sbatch=("--mem=0",), setup=("module load cuda",), python="/home/me/venv/bin/python",
    ),
)  # fmt: skip
ARRAY = replace(
    JOB,
    name="two-runs",
    command=(JOB.command[0],),
    tasks=(("--learning-rate=1e-3",), ("--learning-rate=3e-3", "--targets", "q_proj", "v_proj")),
    resources=Resources(
        array_at_once=1, container="apptainer exec --nv image.sif", starter="torchrun", python="python"
    ),
)
NASTY = 'it\'s "100%j" $(touch /tmp/owned) `id` \\ ; rm -rf ~ #'
FOLDER = NASTY.replace("\\", "")  # Slurm does not accept one in the path of a log


@pytest.mark.parametrize(("name", "job"), [("job.sbatch", JOB), ("array.sbatch", ARRAY)])
def test_the_script_equals_the_golden_file(name, job, monkeypatch):
    """After an intended change: UPDATE_GOLDEN=1 pytest tests/cluster/test_slurm_script.py, then review it."""
    monkeypatch.setattr(slurm, "RANK_ENTRY", Path("/home/me/project/launcher/cluster/rank.py"))

    text = script(job)

    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def nasty_job():
    return replace(JOB, run=f"/data/{FOLDER}", folder=f"/home/{NASTY}", command=(f"/x/{NASTY}.py", f"--data={NASTY}\n"))


def test_bash_reads_back_every_word_as_it_was_given(tmp_path):
    """Runs the script in a real bash, with functions in place of srun, scontrol and python."""
    job = replace(nasty_job(), folder=str(tmp_path), run=f"{tmp_path}/{FOLDER}")
    stand_ins = (
        'srun() { printf \'%s\\0\' "$@" >args; echo finished >"$run/state"; }\n'
        "scontrol() { echo node1; }\nSLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1\n"
    )
    text = script(replace(job, resources=replace(job.resources, setup=(stand_ins,), python="echo")))

    done = subprocess.run(["bash", "-c", text], env={"PATH": os.environ["PATH"], "SLURM_JOB_NODELIST": "node1",
                                                     "SLURM_JOB_ID": "7"}, capture_output=True, text=True)  # fmt: skip

    assert done.returncode == 0, done.stderr
    words = (tmp_path / "args").read_text().split("\0")[:-1]
    assert words[words.index("--") + 1 :] == list(job.command)
    assert words[words.index("--run") + 1] == job.run
    assert not Path("/tmp/owned").exists()


def directives(text):
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


def test_values_cannot_add_or_break_a_directive():
    text = script(replace(nasty_job(), resources=replace(JOB.resources, constraint='a100&"big"|[x*2]')))

    assert len(directives(text)) == len(directives(script(JOB)))
    assert '"--constraint=a100&\\"big\\"|[x*2]"' in text
    first = text.index("\nset -uo")
    assert "#SBATCH" not in text[first:]
    assert "100%%j" in text[:first]  # a % in the folder's name is not a replacement symbol
    assert r"\"100" in text[:first]


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "time"])
@pytest.mark.parametrize("value", ["a\n#SBATCH --uid=0", "a\rb", "a\x00b", "a\u2028b"])
def test_a_line_break_in_a_directive_is_refused(field, value):
    with pytest.raises(ValueError, match="a Slurm job cannot hold"):
        script(replace(JOB, resources=replace(JOB.resources, **{field: value})))


def test_a_backslash_in_the_run_folder_is_refused():
    """Slurm would interpret it and fail the job before its first line, without a log."""
    with pytest.raises(ValueError, match="a path without a backslash"):
        script(replace(JOB, run="/data/a\\b"))


def test_a_run_name_is_text_and_never_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    slurm.submit(str(REPO / "recipes/llama2_alpaca_loldu.py"), Resources(), name=NASTY, dry_run=True)

    text = capsys.readouterr().out
    assert f"run={tmp_path}/runs/it-s-100-j-touch-tmp-owned-id-rm--rf" in text
    assert list(tmp_path.iterdir()) == []  # a dry run writes nothing


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nodes": 0}, "--nodes must be at least 1"),
        ({"gpus_per_node": 8, "processes_per_node": 4}, "one process uses one GPU"),
        ({"sbatch": ("mem=0",)}, "options with dashes"),
        ({"partition": ""}, "--partition is empty"),
        ({"port": 80}, "from 1024 to 65535"),
        ({"host_suffix": "; id"}, "part of a host name"),
    ],
)
def test_a_mistake_in_the_resources_is_named(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Resources(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume", "never"), "--resume never would start over"),
        (("--output=x",), "both set the run folder"),
    ],
)
def test_recipe_options_that_cannot_be_submitted_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        slurm.submit(str(REPO / "recipes/llama2_alpaca_loldu.py"), Resources(), options, name="x", dry_run=True)


def test_an_unknown_recipe_lists_the_recipes():
    with pytest.raises(ValueError, match=r"no recipe or file llama; .*llama2_alpaca_loldu"):
        slurm.submit("llama", Resources(), dry_run=True)


def test_without_slurm_the_error_names_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match=r"sbatch is not on PATH.*--dry-run.*loldu launch"):
        slurm.submit(str(REPO / "recipes/llama2_alpaca_loldu.py"), Resources())

    assert list(tmp_path.iterdir()) == []


class FakeSlurm:
    """Answers as sbatch on a multi-cluster site, and records each command with its environment."""

    def __init__(self, refuse=""):
        self.asked, self.refuse = [], refuse

    def __call__(self, words, env=None, **_):
        self.asked.append((words, env))
        if words[:2] == ["sbatch", "--parsable"] and self.refuse:
            return subprocess.CompletedProcess(words, 1, "", self.refuse)
        return subprocess.CompletedProcess(words, 0, "4711;alpine\n" if "--parsable" in words else "", "")


def test_submitting_keeps_the_job_and_cleans_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    fake = FakeSlurm()

    code = slurm.submit(
        str(REPO / "recipes/llama2_alpaca_loldu.py"), Resources(), ("--rank", "8"), name="a b", run=fake
    )

    folder = tmp_path / "runs" / "a-b"
    assert code == 0
    assert slurm.runs.job_of(folder)["job_id"] == "4711"
    assert slurm.runs.job_of(folder)["cluster"] == "alpine"
    assert all("SBATCH_TIMELIMIT" not in env for words, env in fake.asked if env is not None)
    assert (folder / "logs").is_dir()  # without the folder of the log the job would fail before it starts
    out = capsys.readouterr().out
    assert "4711" in out
    assert "loldu logs -f a-b" in out
    assert slurm.runs.find_run("4711") == slurm.runs.find_run("a b") == slurm.runs.find_run(str(folder)) == folder


def test_the_error_of_sbatch_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusing = FakeSlurm("sbatch: error: Batch job submission failed: Invalid account")

    with pytest.raises(ValueError, match=r"sbatch refused the job: .*Invalid account"):
        slurm.submit(str(REPO / "recipes/llama2_alpaca_loldu.py"), Resources(), name="x", run=refusing)


def test_the_environment_of_another_job_does_not_leak():
    left = clean_environment({"SLURM_CONF": "/c", "SLURM_NTASKS": "8", "SBATCH_QOS": "x", "RANK": "1", "HOME": "/h"})

    assert left == {"SLURM_CONF": "/c", "HOME": "/h"}


def test_array_files_are_read_strictly(tmp_path):
    file = tmp_path / "array.txt"
    file.write_text("--rank 8  # small\n\n--targets q_proj 'v proj'\n")
    assert slurm.read_tasks(file) == (("--rank", "8"), ("--targets", "q_proj", "v proj"))

    file.write_text("--rank 8\n--data 'open\n")
    with pytest.raises(ValueError, match="line 2: No closing quotation"):
        slurm.read_tasks(file)
    file.write_text("--output x\n")
    with pytest.raises(ValueError, match="line 1: an array sets --output itself"):
        slurm.read_tasks(file)


def test_recorded_output_of_slurm_is_parsed():
    running = (GOLDEN / "scontrol_running.txt").read_text()
    array = (GOLDEN / "scontrol_array.txt").read_text()
    sacct = "4711|CANCELLED by 1000|node[1-2]|3\n4712|PENDING|None assigned|0\n"

    assert parse_scontrol(running) == [JobState("3", "RUNNING", "", "node[1-2]", 1)]
    assert [(state.job_id, state.state, state.reason) for state in parse_scontrol(array)] == [
        ("2_1", "PENDING", "JobArrayTaskLimit"),
        ("2_0", "RUNNING", ""),
    ]
    assert parse_sacct(sacct) == [
        JobState("4711", "CANCELLED", "", "node[1-2]", 3),
        JobState("4712", "PENDING", "", "", 0),
    ]
    assert parse_scontrol("slurm_load_jobs error: Invalid job id specified") == []


@pytest.mark.parametrize(
    ("words", "own", "recipes"),
    [
        ("submit r.py --nodes 2 -- --rank 8 -- x", ["r.py", "--nodes", "2"], ("--rank", "8", "--", "x")),
        ("submit r.py", ["r.py"], ()),
        (
            "launch --hostfile h --include=a@b r.py --rank 8",
            ["--hostfile", "h", "--include=a@b", "r.py"],
            ("--rank", "8"),
        ),
        ("launch --hostfile h r.py -- --name x", ["--hostfile", "h", "r.py"], ("--name", "x")),
        ("launch --help", ["--help"], ()),
    ],
)
def test_options_of_the_recipe_are_separated_from_those_of_the_command(words, own, recipes):
    name, *rest = words.split()

    assert split_recipe_options(name, rest) == (own, recipes)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("submit r.py --nodes 2 --lr 1", "after --; type:\n  loldu submit --nodes 2 r.py -- --lr 1"),
        ("submit --lr 1 r.py", "type:\n  loldu submit r.py -- --lr 1"),
        ("submit r.py --targets a b --time=3 -- --seed 2", "  loldu submit --time=3 r.py -- --targets a b --seed 2"),
        ("submit r.py --data 'my file'", "  loldu submit r.py -- --data 'my file'"),
        ("submit r.py --partiton gpu", "no option --partiton: did you mean --partition?"),
        ("launch --hostfile h --rank 8 r.py", "after RECIPE; type:\n  loldu launch --hostfile h r.py --rank 8"),
        ("launch r.py --hostfile h", "--hostfile must come before RECIPE"),
    ],
)
def test_an_option_on_the_wrong_side_gives_the_line_to_type(typed, hint):
    name, *rest = shlex.split(typed)

    with pytest.raises(ValueError, match=re.escape(hint)):
        split_recipe_options(name, rest)


def test_status_asks_slurm_once_however_many_runs(tmp_path, monkeypatch, capsys):
    """Three jobs, one of them an array of two: running, ended, and known only to accounting."""
    monkeypatch.chdir(tmp_path)
    for job_id, name in (("2", "array/task-0"), ("2", "array/task-1"), ("7", "done"), ("8", "gone")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name.partition("/")[0] / "job.json").write_text(json.dumps({"job_id": job_id}))
    there = (GOLDEN / "scontrol_array.txt").read_text() + "JobId=7 JobState=COMPLETED Reason=None NodeList=node1\n"
    asked = []

    def slurm_says(words, **_):
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, there if words[0] == "scontrol" else "8|FAILED|node2|1\n", "")

    slurm_status.status(as_json=True, run=slurm_says)

    rows = {row["run"]: (row["job"], row["slurm"]) for row in json.loads(capsys.readouterr().out)}
    assert rows == {
        "array/task-0": ("2_0", "RUNNING"), "array/task-1": ("2_1", "PENDING"), "done": ("7", "COMPLETED"),
        "gone": ("8", "FAILED"),
    }  # fmt: skip
    assert [words[0] for words in asked] == ["scontrol", "sacct"]


def test_a_task_is_found_in_a_list_of_pending_tasks():
    line = "JobId=9 ArrayJobId=9 ArrayTaskId=0-2,7%2 JobState=PENDING Reason=None"

    def slurm_says(words, **_):
        return subprocess.CompletedProcess(words, 0, f"{line}\nJobId=4 JobState=RUNNING\n", "")

    asked = [({"job_id": "9"}, task) for task in ("1", "3", "7", None)]
    assert [state.state for state in slurm_jobs.job_states(asked, slurm_says)] == [
        "PENDING",
        "UNKNOWN",
        "PENDING",
        "PENDING",
    ]


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="--name '' has no letters or digits"):
        slurm.submit(str(REPO / "recipes/llama2_alpaca_loldu.py"), Resources(), name="", dry_run=True)


def test_the_rank_entry_imports_no_heavy_library():
    """Signal handlers must be installed before seconds of imports."""
    code = "import launcher.cluster.rank, sys; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"

    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout

    assert out.strip() == "[]"
