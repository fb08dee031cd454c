"""The GPU day, rehearsed on a CPU with tiny sizes: every measurement is in the report; what failed or had no time is named there."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from benchmarks.gpu_day import __main__ as gpu_day
from benchmarks.gpu_day import checks, encode_table, forms, step_suspicions
from benchmarks.gpu_day.report import Report, Unfinished
from benchmarks.gpu_day.settings import REHEARSAL, Settings
from benchmarks.machine import Machine
from tests import conftest

ON_THE_MACHINE = {"torch", "triton", "numpy", "safetensors"}  # and nothing else, unless carried


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Report of all sections but the tests: running pytest inside pytest proves nothing here. In a process of its own, because a
    measurement that hangs ends its process.
    """
    folder = tmp_path_factory.mktemp("gpu-day")
    sections = [name for name in gpu_day.SECTIONS if name != "tests"]
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(folder), "--rehearse"]
    done = subprocess.run(
        [*command, "--sections", ",".join(sections)], cwd=checks.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads((folder / "report.json").read_text())
    assert list(content["sections"]) == sections
    return content["sections"]


def entries(section):
    return {entry["name"]: entry for entry in section["entries"]}


def test_every_section_of_the_rehearsal_finishes_without_an_error(rehearsal):
    for name, section in rehearsal.items():
        assert section["finished"], name
        assert section["entries"], name
        assert [entry for entry in section["entries"] if "error" in entry] == [], name


def test_rehearsal_leaves_out_only_what_needs_cuda(rehearsal):
    left_out = {
        entry["name"][:2] for section in rehearsal.values() for entry in section["entries"] if "left_out" in entry
    }
    assert left_out == {"G6", "G8", "G9"}


def test_encode_table_has_a_row_for_every_form_clip_and_network(rehearsal):
    rows = [entry["values"] for entry in rehearsal["encode"]["entries"]]
    of_table = {(row["form"], tuple(row["clip"])) for row in rows if row["network"] == REHEARSAL.network}
    assert of_table == {(form, clip) for form in forms.FORMS for clip in REHEARSAL.clips}
    assert {row["network"] for row in rows} == set(REHEARSAL.checked)
    for row in rows:
        for key in (
            "frames_per_s",
            "step_ms",
            "of_matrix_rate",
            "definition_bytes_of_copy_rate",
            "planes_of_copy_rate",
        ):
            assert row[key] > 0, (row, key)
        assert {"peak_mb", "launches", "first_call_s"} <= set(row)


def test_every_suspicion_of_the_review_has_one_measurement(rehearsal):
    numbers = sorted(int(name.split()[0][1:]) for name in entries(rehearsal["suspicions"]))
    assert numbers == list(range(1, 13))


def test_networks_are_checked_trained_and_profiled(rehearsal):
    checked = entries(rehearsal["check"])
    assert set(checked) == {f"{name} {dtype}" for name in REHEARSAL.checked for dtype in checks.CHECKED_DTYPES}
    for entry in rehearsal["training"]["entries"]:
        assert 0 < entry["values"]["forward_s"] < entry["values"]["step_s"]
    prepared, plain = (entry["values"]["kernels"] for entry in rehearsal["profile"]["entries"])
    for kernels in (prepared, plain):
        shares = [kernel["share"] for kernel in kernels]
        assert shares == sorted(shares, reverse=True)
        assert 0.5 < sum(shares) <= 1.001


def test_forms_give_the_same_latents():
    machine = Machine("cpu", 1)
    clips = forms.random_clips((33, 32, 32), 2)
    prepared = forms.make("leanvae", "kernels", "float32", REHEARSAL, machine).launch(clips)()
    joined = torch.stack([torch.cat([torch.from_numpy(step[i].mean_Cthw) for step in prepared], 1) for i in range(2)])
    plain = torch.from_numpy(forms.make("leanvae", "plain", "float32", REHEARSAL, machine).launch(clips)())
    assert len(prepared) == 2  # two chunks, with causal state between them
    torch.testing.assert_close(joined, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_the_most_informative_cases_come_first():
    settings = Settings()
    listed = encode_table.cases(settings)
    assert [case.form for case in listed[: len(forms.FORMS)]] == list(forms.FORMS)
    first = listed[0]
    assert (first.clip, first.batch, first.dtype) == ((17, 256, 256), 64, "bfloat16")
    rest = listed[len(forms.FORMS) :]
    of_others = [case for case in rest if case.network != settings.network]
    assert len({(case.network, case.form) for case in of_others}) == len(of_others) == 2 * 3
    assert [case.compiles for case in of_others] == [False] * 4 + [True] * 2
    assert rest[:4] == of_others[:4]
    before = rest.index(of_others[4])
    assert not any(case.compiles for case in rest[:before])
    of_network = [case.compiles for case in rest if case.network == settings.network]
    assert of_network == sorted(of_network)
    assert len({case.name for case in listed}) == len(listed)
    assert len(listed) - len(of_others) == (4 * 7 - 2) * 3 * len(forms.FORMS)  # two exceed LARGEST_PLANES


def test_counted_bytes_are_those_of_the_operators_without_views():
    x = torch.empty((4, 8), device="meta")
    with encode_table.MovedBytes() as moved:
        (x.view(8, 4) + 1).add_(1)
    assert moved.total == 2 * 128 + 2 * 128  # read x, write the sum; read it and write it again


def test_graph_uses_are_counted():
    four = {"recorded": 1, "replayed": 8, "rows": 32, "padding": 0}
    assert step_suspicions.graph_uses([4] * 10) == four
    assert step_suspicions.graph_uses([4] * 10 + [3, 2]) == four | {"replayed": 9, "rows": 35, "padding": 1}
    assert step_suspicions.graph_uses(range(1, 11))["replayed"] == 0


def test_failed_measurement_is_recorded_and_the_next_one_runs(tmp_path):
    report = Report(tmp_path / "report.json", time.monotonic() + 1000)
    report.begin("first")

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert report.measure("fails", fail) is None
    on_disk = json.loads(report.path.read_text())["sections"]["first"]  # written before anything else happens
    assert not on_disk["finished"]
    assert "illegal memory access" in on_disk["entries"][0]["error"]
    assert report.measure("works", lambda: {"ms": 1}) == {"ms": 1}
    report.finish()
    assert report.errors == 1
    following = Report(report.path, time.monotonic() - 1)  # the next process of the script
    following.begin("second")
    following.measure("late", fail)
    assert following.values("first") == {"works": {"ms": 1}}
    assert "time" in entries(following.content["sections"]["second"])["late"]["left_out"]


def test_unfinished_section_goes_on_after_the_measurement_in_progress(tmp_path):
    def killed():
        raise KeyboardInterrupt

    cut_off = Report(tmp_path / "report.json", time.monotonic() + 1000)
    cut_off.begin("encode")
    cut_off.measure("first", lambda: {"ms": 1})
    with pytest.raises(KeyboardInterrupt):
        cut_off.measure("hangs", killed)
    assert json.loads(cut_off.path.read_text())["sections"]["encode"]["in_progress"] == "hangs"

    following = Report(cut_off.path, time.monotonic() + 1000)
    following.begin("encode")
    assert following.missing(["first", "hangs", "last"]) == ["last"]
    assert following.measure("first", lambda: {"ms": 2}) == {"ms": 1}
    assert following.measure("first", lambda: {"ms": 3}, again=True) == {"ms": 3}
    assert following.measure("hangs", killed, again=True) is None
    following.measure("last", lambda: {"ms": 4})
    following.finish()
    section = json.loads(following.path.read_text())["sections"]["encode"]
    assert (section["finished"], section["in_progress"]) == (True, None)
    assert set(entries(section)) == {"first", "hangs", "last"}
    assert "took too long" in entries(section)["hangs"]["error"]


def test_measurement_that_hangs_ends_the_process_with_its_stack(tmp_path):
    program = (
        "import pathlib, sys, time; from benchmarks.gpu_day.report import Report\n"
        "report = Report(pathlib.Path(sys.argv[1]), time.monotonic() + 1000, limit_s=0.5)\n"
        "report.begin('encode'); report.measure('quick', dict); report.measure('hangs', lambda: time.sleep(600))"
    )
    path = tmp_path / "report.json"
    done = subprocess.run([sys.executable, "-c", program, path], cwd=checks.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in measure" in done.stderr
    section = json.loads(path.read_text())["sections"]["encode"]
    assert (section["in_progress"], list(entries(section))) == ("hangs", ["quick"])


def test_process_ends_when_the_device_is_lost(tmp_path):
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    report = Report(tmp_path / "report.json", time.monotonic() + 1000, check_device=fail)
    report.begin("encode")
    with pytest.raises(Unfinished) as ended:
        report.measure("fails", fail)
    assert ended.value.code not in (0, 1, 2, gpu_day.FAILED)
    section = json.loads(report.path.read_text())["sections"]["encode"]
    assert "illegal memory access" in entries(section)["fails"]["error"]
    assert not section["finished"]


def test_cases_without_time_are_named(tmp_path):
    report = Report(tmp_path / "report.json", time.monotonic() - 1)
    report.begin("encode")
    encode_table.run(report, REHEARSAL, Machine("cpu", 1))
    (entry,) = report.content["sections"]["encode"]["entries"]
    assert all(case.name in entry["left_out"] for case in encode_table.cases(REHEARSAL))


def script(folder, program, **environment):
    """The script in a process group of its own; `program` of the shell replaces Python; in sections, $6 is the section's name."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncd "{folder}"\nif [ "$2" = benchmarks.gpu_day ]; then echo "begins $6"; fi\n{program}\n'
    )
    python.chmod(0o755)
    # A suite that runs in the background or by nohup ignores signals, which a shell that inherits this cannot trap.
    start = ["env", "--default-signal"]
    command = [*start, checks.ROOT / "benchmarks" / "gpu_day.sh", folder / "out", "--rehearse"]
    kept = {name: value for name, value in os.environ.items() if name != "WHEELS"}
    environment = kept | {"PYTHON": str(python)} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_script_begins_a_section_again_that_ended_early(tmp_path):
    with script(
        tmp_path, 'if [ "$6" = check ]; then if [ -e seen ]; then exit 3; fi; touch seen; exit 1; fi'
    ) as running:
        output = running.communicate()[0]
    assert running.returncode == 1
    begun = re.findall(r"begins (\w+)", output)
    assert begun == ["facts", "tests", "check", *list(gpu_day.SECTIONS)[2:]]
    assert "section check ended early, attempt 1, exit code 1" in output
    assert (tmp_path / "out" / "log").read_text() == output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
def test_script_that_is_stopped_ends_what_it_started_and_says_so(number, tmp_path):
    """By a signal to its whole process group, as from Ctrl-C, `timeout` or a terminal that is closed: its `tee` gets it too."""
    with script(tmp_path, "echo $$ >pid; echo ready; exec sleep 600") as running:
        assert [running.stdout.readline() for _ in range(2)] == ["begins facts\n", "ready\n"]
        os.killpg(running.pid, number)
        output = running.communicate()[0]
    assert running.returncode == 143
    assert "stopped by a signal" in output
    assert (tmp_path / "out" / "log").read_text() == f"begins facts\nready\n{output}"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def write_package(folder, name, version):
    """A package as installed, with its metadata: `NAME.version` is the version. Returns its files."""
    information = folder / f"{name}-{version}.dist-info"
    texts = {
        folder / name / "__init__.py": f"version = {version!r}\n",
        information / "METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n",
        information / "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        information / "RECORD": "",
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(texts)


def test_carried_wheels_only_add_what_the_machine_lacks(tmp_path):
    """A newer huggingface_hub in front of the machine's own broke its transformers, which diffusers imports."""
    machine, wheels = tmp_path / "machine", tmp_path / "my wheels"
    wheels.mkdir()
    for name, version in (("carried_newer", "1.33.0"), ("carried_older", "5.0")):
        write_package(machine, name, version)
    for name, version in (("carried_newer", "2.4.0"), ("carried_older", "4.0"), ("carried_alone", "0.1")):
        with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for path in write_package(tmp_path / "unpacked", name, version):
                wheel.write(path, path.relative_to(tmp_path / "unpacked"))
    versions = "import carried_alone as a, carried_newer as n, carried_older as o; print('uses', a.version, n.version, o.version)"
    program = f"""case "$2" in
        benchmarks.gpu_day) exec {sys.executable} -c "{versions}" ;;
        *) exec {sys.executable} "$@" ;;
    esac"""
    # As site-packages, a folder of the user's PYTHONPATH comes after what the script puts there.
    with script(tmp_path, program, WHEELS=str(wheels), PYTHONPATH=str(machine)) as running:
        output = running.communicate()[0]
    assert running.returncode == 0, output
    assert output.count("uses 0.1 1.33.0 5.0\n") == len(gpu_day.SECTIONS), output
    assert "carried_newer 1.33.0 (carried: 2.4.0), carried_older 5.0 (carried: 4.0)\n" in output


def test_script_runs_all_sections_within_nine_minutes():
    script = (checks.ROOT / "benchmarks" / "gpu_day.sh").read_text()
    (listed,) = re.findall(r"for section in (.*); do", script)
    seconds = {name: int(time_s) for name, time_s in (item.split(":") for item in listed.split())}
    assert list(seconds) == list(gpu_day.SECTIONS)
    assert sum(seconds.values()) + 10 + 5 < 9 * 60  # a measurement that ends late, and its kill


def test_without_cuda_the_day_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_day.main(["--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_skipped_test_of_a_gpu_is_a_failed_one_where_a_gpu_is_required():
    skip = ("test_x.py", 1, "Skipped: needs a CUDA device")
    report = pytest.TestReport("test_x.py::t", ("test_x.py", 1, "t"), {}, "skipped", skip, "setup")
    conftest.forbid_skip(report)
    assert report.failed
    assert "needs a CUDA device" in str(report.longrepr)
    passed = pytest.TestReport("test_x.py::t", ("test_x.py", 1, "t"), {}, "passed", None, "call")
    conftest.forbid_skip(passed)
    assert passed.passed


def test_files_with_gpu_tests_are_found():
    assert {"tests/engine/test_encoder_devices.py", "tests/model/test_leanvae_fused.py"} <= set(checks.gpu_test_files())


def imported(path):
    """Dotted names that a file imports when it is loaded: not in functions, not for type checkers."""
    pending, names = list(ast.parse(path.read_text()).body), []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
    return names


def files_of(name):
    """Files of the project that are loaded for a dotted name: packages on the way, and the module."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        stem = checks.ROOT.joinpath(*parts[:end])
        yield from (path for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.exists())


def test_the_day_needs_only_what_such_a_machine_has():
    # loaded by name at run time: `importlib` in the registry of networks
    begun = ["benchmarks.gpu_day.__main__", "model.leanvae.vae", "model.wfvae.vae", "model.ivvae.vae"]
    pending, seen, foreign = [path for name in begun for path in files_of(name)], set(), set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported(path):
            found = list(files_of(name))
            pending += found
            if not found:
                foreign.add(name.split(".")[0])
    assert len(seen) > 40
    assert foreign - set(sys.stdlib_module_names) <= ON_THE_MACHINE
