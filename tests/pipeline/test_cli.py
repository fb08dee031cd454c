"""The command line: exit codes, one-line errors, and the output of each command on a real build."""

import json
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import pipeline
from pipeline import cli
from pipeline.cli.app import app
from pipeline.cli.nightly_command import night_lines
from pipeline.cli.progress import display_for
from pipeline.cli.terminal import fail, show_result
from pipeline.errors import PublishFailed
from pipeline.nightly.night import RejectedInput, new_night
from tests import forked_command
from tests.tiny_corpus import make_corpus, tiny_flags, tiny_job, video_bytes, write_tar


def lathe(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    corpus = make_corpus(folder / "corpus", shards=2)
    pipeline.encode(tiny_job(corpus, folder / "out"))
    return corpus, folder / "out"


def test_a_job_file_alone_is_enough(built, tmp_path):
    corpus, _ = built
    job = tmp_path / "job.yaml"
    job.write_text(
        json.dumps({"inputs": [str(corpus)], "output": str(tmp_path / "out"), "engine": {"executor": "inline"}})
    )
    result = lathe("encode", "--config", job, *tiny_flags())
    assert "6 in = 4 encoded + 2 rejected" in result.stdout
    assert "UNTRAINED" in result.stderr
    assert "UNTRAINED" in result.stdout


def test_progress_json_is_json_lines_with_a_report_at_the_end(built, tmp_path):
    corpus, _ = built
    flags = [flag if flag != "plain" else "json" for flag in tiny_flags("--executor", "inline")]
    lines = lathe("encode", corpus, tmp_path / "out", *flags).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert {"notice", "progress", "report"} == {event["event"] for event in events}
    report = events[-1]
    assert (report["event"], report["ok"], report["counts"]["samples"], report["untrained"]) == (
        "report",
        True,
        6,
        True,
    )
    assert report["rejects"] == {"too_short": 2}


def test_progress_json_stays_json_lines_when_the_build_is_published(built, tmp_path, monkeypatch):
    corpus, _ = built
    flags = [flag if flag != "plain" else "json" for flag in tiny_flags("--executor", "inline")]
    encode = ["encode", corpus, tmp_path / "out", *flags, "--publish"]
    last = json.loads(lathe(*encode).stdout.splitlines()[-1])
    assert (last["event"], last["snapshot"]["counts"]["rows"]) == ("published", 8)

    def publish(*arguments, **options):
        raise PublishFailed("a check failed")

    monkeypatch.setattr("pipeline.operate.publish.publish", publish)
    last = json.loads(lathe(*encode, code=1).stdout.splitlines()[-1])
    assert last == {"event": "publish_failed", "made": False, "error": "a check failed", "checks": []}


def test_status_inspect_verify_describe_an_output(built):
    _, output = built
    assert "6 in = 4 encoded + 2 rejected" in lathe("status", output).stdout
    status = json.loads(lathe("status", output, "--json").stdout)
    assert (status["samples"], status["rejects"]) == (6, {"too_short": 2})
    assert status["progress"] is None  # no build runs
    assert not (output / "progress").exists() or not list((output / "progress").iterdir())
    text = lathe("inspect", output).stdout
    assert "weights_sha256" in text
    assert "v5x32x32" in text
    data = next(output.glob("data/*/*/*.parquet"))
    assert "untrained" in lathe("inspect", data).stdout
    assert "no problems" in lathe("verify", output).stdout


def test_verify_of_a_damaged_output_is_exit_code_1(built, tmp_path):
    import shutil

    broken = tmp_path / "out"
    shutil.copytree(built[1], broken)
    data = next(broken.glob("data/*/*/*.parquet"))
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 1
    data.write_bytes(content)
    assert data.name in lathe("verify", broken, code=1).stdout


def test_verify_of_another_folder_fails(tmp_path):
    assert "not a latent set" in lathe("verify", tmp_path, code=1).stdout


def test_plan_predicts_what_encode_does(built, tmp_path):
    corpus, _ = built
    text = lathe("plan", corpus, "--frames", "5", "--size", "32x32", "--clips", "tile").stdout
    assert "6 samples: 4 give" in text
    assert "too_short" in text
    job = {"inputs": [str(corpus)], "clips": {"frames": [5], "size": ["32x32"], "select": "tile"}}
    job["write"] = {"store": ["first_frame"], "compression": "zstd"}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    plan = json.loads(lathe("plan", "--config", tmp_path / "job.yaml", "--json").stdout)
    assert plan["first_frame_bytes"] == pytest.approx(plan["clips"] * 32 * 32 * 0.4, abs=1)
    assert "before compression by zstd" in plan["notices"][0]
    status = json.loads(lathe("status", built[1], "--json").stdout)
    assert (plan["clips"], plan["frames"]) == (status["clips"], status["frames"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("encode", "only-one-path"), "INPUT... OUTPUT"),
        (("encode", "nothing-here", "out"), "nothing-here"),
        (("encode", "a", "b", "--model", "nonesuch"), "leanvae-dim16"),
        (("encode", "a", "b", "--frames", "6"), "5 or 9"),
        (("encode", "a", "b", "--size", "33x32"), "33"),
        (("encode", "a", "b", "--clips", "zigzag"), "zigzag"),
        (("encode", "a", "ftp://b"), "ftp"),
        (("encode", "a", "b", "--config", "no.yaml"), "no.yaml"),
        (("plan", "nothing-here"), "nothing-here"),
        (("status", "nowhere"), "nowhere"),
        (("inspect", "nowhere"), "nowhere"),
        (("sample", "x", "--layout", "zip"), "zip"),
        (("convert-checkpoint", "none.ckpt", "out.safetensors"), "none.ckpt"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = lathe(*arguments, code=2)
    assert result.stderr.startswith("lathe: error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert text in result.stderr
    assert "Traceback" not in result.output


def test_exceeded_reject_budget_is_exit_code_1_with_the_summary(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{n}": {"mp4": b"junk" if n else video_bytes(9)} for n in range(4)})
    result = lathe("encode", tmp_path / "a.tar", tmp_path / "out", *tiny_flags("--executor", "inline"), code=1)
    assert "3 of 4 samples are damaged" in result.stderr
    assert "undecodable 3" in result.stdout


def test_a_thread_of_a_library_that_is_still_at_work_does_not_change_the_exit_code():
    """A daemon thread as torch and Arrow have them, which aborts the process where the interpreter ends it: that must not happen."""
    program = (
        "import sys, threading, time, atexit\n"
        "from pipeline import cli\n"
        "atexit.register(print, 'registered')\n"
        "threading.Thread(target=lambda: (threading.main_thread().join(), print('waited for'))).start()\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "class Aborts:\n"
        "    def __del__(self): import os; os.abort()\n"
        "kept = Aborts()\n"
        "sys.argv[1:] = ['models', '--json']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("waited for\nregistered\n")


@pytest.mark.parametrize(("raised", "code"), [(SystemExit(3), 3), (SystemExit(None), 0), (KeyboardInterrupt(), 130)])
def test_the_process_ends_with_the_code_of_the_command(monkeypatch, capsys, raised, code):
    def command():
        raise raised

    ended = []
    monkeypatch.setattr("pipeline.cli.app.app", command)
    monkeypatch.setattr("pipeline.cli._end", ended.append)
    cli.main()
    assert ended == [code]
    assert capsys.readouterr().err == ("lathe: stopped\n" if code == 130 else "")


def test_ctrl_c_while_commands_are_imported_is_one_line_and_exit_code_130(tmp_path):
    (tmp_path / "typer.py").write_text("print('importing', flush=True)\nimport time; time.sleep(600)\n")
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with `&`\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pipeline import cli\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "lathe: stopped\n"
    assert process.returncode == 130


def test_debug_shows_where_an_error_came_from(tmp_path):
    run = forked_command.run("encode", tmp_path / "no.tar", tmp_path / "out", "--untrained", "0", "--debug")
    assert run.returncode != 0
    assert "Traceback" in run.stderr
    assert "InputError" in run.stderr


def test_names_from_the_data_do_not_reach_the_terminal_as_they_are(capsys):
    name = "a\udcff\x1b[2J\nb\u202e größer\u3000"
    shown = r"a\xff\x1b[2J\nb\u202e größer" + "\u3000"
    night = new_night("out")
    night.rejected = [RejectedInput(name, name, "too_short", name)]
    show_result(night.to_dict(), night_lines, as_json=False)
    with pytest.raises(typer.Exit):
        fail(name, 2)
    display_for("plain").notice(name)
    out, err = capsys.readouterr()
    assert f"{shown} {shown}: too_short, {shown}\n" in out
    assert err == f"lathe: error: {shown}\nlathe: " + shown.replace(r"\n", "\n") + "\n"
    assert "\x1b" not in out + err


@pytest.mark.parametrize("kind", ["rich", "plain"])
def test_displays_show_percentage_shards_rates_and_time_left(kind, capsys, monkeypatch):
    import re

    from pipeline.cli.progress import display_for
    from pipeline.engine.driver.progress import BuildProgress

    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)  # a terminal, to rich

    display = display_for(kind)
    display.notice("mind the gap")
    display.update(BuildProgress(10, 4, 100, 40, 7, 119, 12.5, 20, 3, 2, 60.0, 90.0))
    display.close(None)
    shown = capsys.readouterr().err
    for text in ("mind the gap", "40%", "4/10", "12.5 frames/s", "3 rejects", "1m30s"):
        assert text in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
