"""`lathe serve` on real sockets: what it shows, to whom, that it writes nothing; its page in a browser follows a build."""

import http.client
import json
import os
import signal
import socket
import struct
import threading
import time
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import StorageConfig
from pipeline.errors import ConfigError, OutputError
from pipeline.ledger.takedowns import record_takedown
from pipeline.report.serving import open_server
from tests.pipeline.latent_clips import local_store
from tests.report.browser import browser, visit
from tests.report.outputs import SCRIPT, add_shard, publish, source
from tests.swift_server import free_ports


@contextmanager
def serving(store, config=None):
    with open_server(store, config or StorageConfig(), 0) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"  # not reached from elsewhere
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


@pytest.fixture
def store(tmp_path):
    store = local_store(tmp_path / "out")
    add_shard(store, tmp_path, 0, ("kept", "secret"))
    publish(store)
    return store


def test_it_shows_snapshots_builds_and_pages_and_writes_nothing(store):
    before = {info.key: info.etag for info in store.list()}
    with serving(store) as port:
        status, body = ask(port, "/")
        assert status == 200
        assert 'href="snapshots/1.html"' in body
        assert json.loads(ask(port, "/progress.json")[1])["progress"] is None
        assert "What was left out" in ask(port, "/snapshots/1.html")[1]
        assert ask(port, "/", method="HEAD") == (200, "")
        assert ask(port, "/snapshots/2.html")[0] == 404
        assert ask(port, "/../../etc/passwd")[0] == 404
        assert ask(port, "/", method="POST")[0] == 501
    assert {info.key: info.etag for info in store.list()} == before


def test_other_hosts_are_refused(store):
    with serving(store) as port:
        assert ask(port, "/", host="evil.example")[0] == 403
        assert ask(port, "/", host=f"localhost:{port}")[0] == 200


def test_a_browser_that_goes_away_is_no_news(store, capfd):
    with serving(store) as port:
        for request in (b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: LOCALHOST\r\n\r\n"):
            client = socket.create_connection(("127.0.0.1", port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
            client.sendall(request)
            client.close()
        assert ask(port, "/?from=bookmark", host=f"LOCALHOST:{port}")[0] == 200
    assert capfd.readouterr().err == ""


def test_an_error_of_the_server_is_news(store, capfd, monkeypatch):
    with serving(store) as port:
        monkeypatch.setattr("pipeline.report.serving.OutputServer.index", lambda server: 1 / 0)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(port, "/")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_takedown_reaches_a_page_that_was_made_before(store):
    with serving(store) as port:
        assert "secret" in ask(port, "/snapshots/1.html")[1]
        record_takedown(store, "asked", samples=[(source(0), "dir/video00001")])
        assert "secret" not in ask(port, "/snapshots/1.html")[1]


def test_a_damaged_snapshot_is_listed_and_its_page_says_why(store):
    store.write("_snapshots/2.json", b'{"format": "nothing"}')
    with serving(store) as port:
        assert "damaged" in ask(port, "/")[1]
        status, body = ask(port, "/snapshots/2.html")
    assert (status, "cannot be read as a snapshot" in body) == (500, True)


def test_a_wrong_output_and_a_used_port_are_refused(store, tmp_path):
    with pytest.raises(OutputError, match="is not a latent set"):
        open_server(local_store(tmp_path / "empty"), StorageConfig(), 0)
    with serving(store) as port, pytest.raises(ConfigError, match=f"--port {port}: .*; name another"):
        open_server(store, StorageConfig(), port)


def test_a_browser_follows_a_build(store):
    beat = {"build": f"b1 {SCRIPT}", "every_s": 3600, "running": True, "started": time.time(), "frames_per_s": 12.5}
    store.write("_progress/b1.json", json.dumps({**beat, "shards_done": 3, "shards_total": 12, "eta_s": 90}).encode())
    with serving(store) as port, browser() as opened, visit(opened, f"http://127.0.0.1:{port}/") as seen:
        line = seen.page.get_by_text("3 of 12 shards, 12.5 frames/s, about 2 minutes left")
        line.wait_for()
        assert SCRIPT in line.inner_text()
        assert seen.page.locator("progress").get_attribute("value") == "3"
        store.delete("_progress/b1.json")
        seen.page.evaluate("look()")  # as it does by itself every five seconds
        seen.page.get_by_text("No build runs.").wait_for()
        seen.page.get_by_role("link", name="snapshot 1").click()
        seen.page.get_by_role("heading", name="What was left out, and why").wait_for()
        assert [line for line in seen.logged if "favicon" not in line] == []


def test_the_command_serves_until_ctrl_c(store):
    """The signal goes to this process, once the command answers."""
    (port,) = free_ports(1)

    def stop():
        while True:
            try:
                ask(port, "/")
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    result = CliRunner().invoke(app, ["serve", store.root, "--port", str(port)])
    thread.join()
    assert (result.exit_code, result.stdout) == (0, f"http://127.0.0.1:{port}/ shows {store.root}; Ctrl-C ends it\n")


def test_one_snapshot_is_not_served(store):
    result = CliRunner().invoke(app, ["serve", f"{store.root}@1"])
    assert result.exit_code == 2
    assert f"all snapshots are served; write {store.root}" in result.stderr
