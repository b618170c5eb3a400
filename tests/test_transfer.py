"""A download ends as the right file or as one sentence and no file, whatever servers, networks and killers do."""

import errno
import hashlib
import json
import os
import pty
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catdog import transfer
from catdog.errors import CatdogError
from catdog.files import DiskError
from catdog.transfer import Patience, Transferred, downloaded, identity, public_url
from conftest import wait_until
from hostile_server import Answer, Relay, hostile_server

DATA = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
HALF = len(DATA) // 2
SHA = hashlib.sha256(DATA).hexdigest()
ETAG = {"ETag": '"first"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
OTHER_ETAG = {"ETag": '"second"', "Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}
GOOD = Answer(DATA, headers=ETAG)
QUICK = Patience(connect_timeout=5, stall_timeout=10, attempts=3, first_wait=0.01, longest_wait=0.02)
REST = f"bytes={HALF - 1}-"  # from the last byte that is there


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    with hostile_server() as server:
        yield server


def download(urls, target, **options) -> Transferred:
    """Downloads a file and copies it to `target`."""
    with downloaded(urls, target, **options) as (file, facts):
        shutil.copyfile(file, target)
    return facts


@pytest.fixture
def bring(tmp_path):
    """Downloads to `target`; a second call continues what the first one left."""

    def bring(*urls, target=tmp_path / "target.zip", patience=QUICK, **options) -> Transferred:
        return download(urls, target, parts=tmp_path / "parts", patience=patience, **options)

    return bring


@pytest.fixture
def got(tmp_path):
    """Tells whether the target is as it should be, and nothing but locks was left behind."""

    def got(data=DATA) -> bool:
        left = {path.suffix for path in (tmp_path / "parts").iterdir()}
        return (tmp_path / "target.zip").read_bytes() == data and left <= {".lock"}

    return got


def refused(act) -> str:
    with pytest.raises(CatdogError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def part_of(folder: Path) -> Path | None:
    return next(iter((folder / "parts").glob("*.part")), None)


# ---------------------------------------------------------------------------------------------------------- a good day


def test_file_comes_whole_and_its_facts_are_told(server, bring, got, capsys):
    url = server.offer("/pets.zip", GOOD)
    secret = url.replace("://", "://user:word@") + "?id=7&token=abc"
    server.offer("/pets.zip?id=7&token=abc", GOOD)
    assert bring(secret, sha256=SHA.upper(), size=len(DATA)) == Transferred(
        url + "?id=7", len(DATA), SHA, ETAG["ETag"], ETAG["Last-Modified"]
    )
    assert got()
    assert capsys.readouterr().err == ""
    assert [seen.encoding for seen in server.seen] == ["identity"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(DATA, chunked=True),
        Answer(DATA, chunked=True, headers={"Content-Length": "5"}),  # chunks override it
        Answer(DATA, headers={"Content-Length": None}),
    ],
)
def test_length_need_not_be_announced(server, bring, got, answer):
    result = bring(server.offer("/f", answer))
    assert got()
    assert (result.sha256, result.etag, result.last_modified) == (SHA, None, None)


def test_empty_file_is_a_file(server, bring, got):
    assert bring(server.offer("/f", Answer(b"")), size=0).bytes == 0
    assert got(b"")


def test_bytes_are_taken_as_they_are_even_if_they_are_called_encoded(server, bring, got):
    bring(server.offer("/f.tar.gz", Answer(DATA, headers={"Content-Encoding": "gzip"})))
    assert got()


def test_target_is_replaced_only_by_the_whole_new_file(server, bring, got, tmp_path):
    (tmp_path / "target.zip").write_bytes(b"old")
    url = server.offer("/f", Answer(DATA, headers=ETAG, cut=HALF), *[Answer(status=503)] * 3, GOOD)
    refused(lambda: bring(url))
    assert (tmp_path / "target.zip").read_bytes() == b"old"
    bring(url)
    assert got()


def test_target_may_lie_on_another_file_system(server, bring, tmp_path, monkeypatch):
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    target = shared_memory / f"catdog-{os.getpid()}" / "target.zip"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": len(DATA)}))
    try:
        bring(server.offer("/f", GOOD), target=target)
        assert target.read_bytes() == DATA
        assert [path.name for path in target.parent.iterdir()] == [target.name]
        assert part_of(tmp_path) is None
    finally:
        target.unlink(missing_ok=True)
        target.parent.rmdir()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), DiskError("full")])
@pytest.mark.parametrize("known", [False, True])
def test_file_that_was_not_used_up_is_taken_by_the_next_call(server, bring, got, tmp_path, capsys, failure, known):
    url, sha256 = server.offer("/f", GOOD), SHA if known else ""
    with (
        pytest.raises(type(failure)),
        downloaded([url], tmp_path / "target.zip", parts=tmp_path / "parts", sha256=sha256),
    ):
        raise failure
    assert bring(url, sha256=sha256) == Transferred(url, len(DATA), SHA, ETAG["ETag"], ETAG["Last-Modified"])
    assert got()
    assert server.ranges("/f") == ([None] if known else [None, f"bytes={len(DATA) - 1}-"])
    assert ("all 0.3 MB are here from before" if known else "going on after 0.3 MB") in capsys.readouterr().err


def test_unused_file_is_fetched_anew_where_the_server_has_another(server, bring, got, tmp_path):
    url = server.offer("/f", Answer(OTHER, headers=OTHER_ETAG), GOOD)
    with pytest.raises(KeyboardInterrupt), downloaded([url], tmp_path / "target.zip", parts=tmp_path / "parts"):
        raise KeyboardInterrupt
    bring(url)
    assert got()


def test_unused_file_that_was_damaged_meanwhile_is_fetched_anew(server, bring, got, tmp_path):
    url = server.offer("/f", GOOD)
    with (
        pytest.raises(KeyboardInterrupt),
        downloaded([url], tmp_path / "target.zip", parts=tmp_path / "parts", sha256=SHA),
    ):
        raise KeyboardInterrupt
    part_of(tmp_path).write_bytes(OTHER)
    bring(url, sha256=SHA)
    assert got()


def test_file_that_is_of_no_use_is_removed(server, tmp_path):
    url = server.offer("/f", GOOD)
    with (
        pytest.raises(CatdogError, match="no archive"),
        downloaded([url], tmp_path / "target.zip", parts=tmp_path / "parts"),
    ):
        raise CatdogError("no archive")
    assert {path.suffix for path in (tmp_path / "parts").iterdir()} <= {".lock"}


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("headers", [ETAG, {"ETag": '"only"'}, {"Last-Modified": ETAG["Last-Modified"]}])
@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_lost_connection_goes_on_with_the_rest_only(server, bring, got, capsys, headers, fault):
    url = server.offer("/f", Answer(DATA, headers=headers, **{fault: HALF}), Answer(DATA, headers=headers))
    bring(url, patience=replace(QUICK, stall_timeout=0.6) if fault == "stall" else QUICK)
    assert got()
    assert server.ranges("/f") == [None, REST]
    assert server.seen[-1].if_range == next(iter(headers.values()))
    reason = "the connection was cut" if fault == "cut" else "nothing came for 0.6 s"
    assert capsys.readouterr().err == f"download: {reason} after 0.1 MB, trying again in 0.01 s\n"


def test_later_call_goes_on_with_the_rest_only(server, bring, got, capsys):
    url = server.offer("/f", Answer(DATA, headers=ETAG, cut=HALF), Answer(status=404), GOOD)
    assert "404" in refused(lambda: bring(url))
    capsys.readouterr()
    bring(url)
    assert got()
    assert server.ranges("/f") == [None, REST, REST]
    assert capsys.readouterr().err == "download: going on after 0.1 MB\n"


def test_signature_may_change_between_the_calls(server, bring, got):
    first = server.offer("/f?X-Amz-Signature=1", Answer(DATA, headers=ETAG, cut=HALF), Answer(status=403))
    second = server.offer("/f?X-Amz-Signature=2", GOOD)
    refused(lambda: bring(first))
    bring(second)
    assert got()
    assert server.ranges("/f?X-Amz-Signature=2") == [REST]


def test_complete_part_is_asked_for_one_byte_only(server, bring, got, tmp_path):
    url = server.offer("/f", Answer(DATA, headers=ETAG, cut=HALF), Answer(status=404), GOOD)
    refused(lambda: bring(url))
    part_of(tmp_path).write_bytes(DATA)
    bring(url)
    assert got()
    assert server.ranges("/f")[-1] == f"bytes={len(DATA) - 1}-"


def test_bytes_without_proof_of_their_version_are_not_continued(server, bring, got, tmp_path):
    weak = {"ETag": 'W/"first"'}
    url = server.offer("/f", Answer(OTHER, headers=weak, cut=HALF), Answer(DATA, headers=weak))
    bring(url)
    assert got()
    assert server.ranges("/f") == [None, None]


@pytest.mark.parametrize("damage", ["{", "[]", '{"url": 1}', None])
def test_part_without_a_readable_version_is_not_continued(server, bring, got, tmp_path, damage):
    url = server.offer("/f", Answer(OTHER, headers=ETAG, cut=HALF), Answer(status=404), GOOD)
    refused(lambda: bring(url))
    version = part_of(tmp_path).with_suffix(".json")
    version.unlink() if damage is None else version.write_text(damage)
    bring(url)
    assert got()
    assert server.ranges("/f")[-1] is None


def test_known_sha256_lets_another_mirror_go_on(server, bring, got):
    first = server.offer("/a", Answer(DATA, headers=ETAG, cut=HALF), Answer(status=410))
    second = server.offer("/b", Answer(DATA, headers=OTHER_ETAG))
    result = bring(first, second, sha256=SHA)
    assert got()
    assert (result.url, result.etag) == (second, OTHER_ETAG["ETag"])
    assert server.ranges("/b") == [REST]
    assert server.seen[-1].if_range is None


def test_another_mirror_starts_anew_where_the_sha256_is_unknown(server, bring, got):
    first = server.offer("/a", Answer(OTHER, headers=ETAG, cut=HALF), Answer(status=410))
    bring(first, server.offer("/b", GOOD))
    assert server.ranges("/b") == [None]
    assert got()


def test_mirror_of_another_length_starts_anew(server, bring, got):
    first = server.offer("/a", Answer(DATA[:-1], headers=ETAG, cut=HALF), Answer(status=410))
    bring(first, server.offer("/b", GOOD), sha256=SHA)
    assert server.ranges("/b") == [REST, None]
    assert got()


@pytest.mark.parametrize("changed", [Answer(OTHER, headers=OTHER_ETAG), Answer(OTHER[:9], headers=OTHER_ETAG)])
@pytest.mark.parametrize("if_range", [True, False])
def test_file_that_changed_between_attempts_is_fetched_from_its_start(server, bring, got, changed, if_range):
    changed = Answer(changed.data, headers=OTHER_ETAG, if_range=if_range)
    result = bring(server.offer("/f", Answer(DATA, headers=ETAG, cut=HALF), changed))
    assert got(changed.data)
    assert result.etag == OTHER_ETAG["ETag"]


@pytest.mark.parametrize(
    "wrong",
    [
        Answer(DATA, headers=ETAG, ranges=False),
        Answer(DATA, headers={**ETAG, "Content-Range": "bytes 0-9/10"}),
        Answer(DATA, headers={**ETAG, "Content-Range": f"bytes {HALF}-{len(DATA) - 1}/{len(DATA)}"}),
        Answer(DATA, headers={**ETAG, "Content-Range": f"bytes {HALF - 1}-{len(DATA) - 1}/{len(DATA) + 5}"}),
        Answer(DATA, headers={**ETAG, "Content-Range": "rubbish"}),
        Answer(DATA, headers={**ETAG, "Content-Range": None}),
        Answer(status=416),
        Answer(hang_up=True),
    ],
    ids=["ignores ranges", "start", "one off", "total", "rubbish", "none", "416", "hangs up"],
)
def test_wrong_answer_to_a_range_never_spoils_the_file(server, bring, got, wrong):
    bring(server.offer("/f", Answer(DATA, headers=ETAG, cut=HALF), wrong, GOOD))
    assert got()


def test_length_that_was_told_once_is_remembered(server, bring, got):
    rest = {**ETAG, "Content-Range": f"bytes {HALF - 1}-{len(DATA) - 1}/*", "Content-Length": None}
    bring(server.offer("/f", Answer(DATA, headers=ETAG, cut=HALF), Answer(DATA, headers=rest, cut=1000), GOOD))
    assert got()
    assert server.ranges("/f") == [None, REST, f"bytes={HALF + 998}-"]


def test_more_bytes_than_the_range_has_are_not_believed(server, bring, got):
    overlong = Answer(
        DATA, headers={**ETAG, "Content-Range": f"bytes {HALF - 1}-{len(DATA) - 2}/{len(DATA) - 1}"}, if_range=False
    )
    cut = Answer(DATA, headers=ETAG | {"Content-Length": str(len(DATA) - 1)}, cut=HALF)
    bring(server.offer("/f", cut, overlong, GOOD))
    assert got()


# ------------------------------------------------------------------------------------------------------ retry, give up


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520])
def test_passing_trouble_is_waited_out(server, bring, got, status):
    bring(server.offer("/f", Answer(status=status), Answer(status=status), GOOD))
    assert got()
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [204, 400, 401, 403, 404, 410, 451])
def test_final_answer_leads_to_the_next_mirror_at_once(server, bring, got, status, capsys):
    first = server.offer("/a", Answer(status=status))
    second = server.offer("/b", GOOD)
    assert bring(first, second).url == second
    assert got()
    assert [seen.path for seen in server.seen] == ["/a", "/b"]
    assert f"{first}: the server answered {status} " in capsys.readouterr().err


def test_attempts_are_counted_anew_whenever_the_part_grew(server, bring, got):
    steps = [Answer(DATA, headers=ETAG, cut=size) for size in [30_000] + [30_001] * 9]
    trouble = [answer for step in steps for answer in (step, Answer(status=500), Answer(hang_up=True))]
    bring(server.offer("/f", *trouble, GOOD), patience=Patience(attempts=3, first_wait=0))
    assert got()


def test_server_that_always_starts_anew_and_always_cuts_is_given_up(server, bring):
    url = server.offer("/f", Answer(DATA, headers=ETAG, ranges=False, cut=HALF))
    assert "the connection was cut, 3 times in a row" in refused(lambda: bring(url))
    assert len(server.seen) == 4


def test_waits_double_up_to_a_limit(server, bring, capsys):
    patience = Patience(attempts=5, first_wait=0.01, longest_wait=0.03)
    refused(lambda: bring(server.offer("/f", Answer(status=500)), patience=patience))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("again in ")[2] for line in lines] == ["0.01 s", "0.02 s", "0.03 s", "0.03 s"]


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(server, bring, got, as_date):
    # A date has whole seconds: between 1 and 2 from now.
    value = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    start = time.monotonic()
    bring(server.offer("/f", Answer(status=429, headers={"Retry-After": value}), GOOD))
    assert 0.9 < time.monotonic() - start < 10
    assert got()


def test_unreadable_retry_after_is_no_retry_after(server, bring, got):
    bring(server.offer("/f", Answer(status=503, headers={"Retry-After": "soon"}), GOOD))
    assert got()


def test_server_that_wants_hours_is_left_for_the_next(server, bring, got):
    first = server.offer("/a", Answer(status=429, headers={"Retry-After": "3600"}))
    assert bring(first, server.offer("/b", GOOD)).url.endswith("/b")
    assert "left alone for 3,600 s" in refused(lambda: bring(first))


def test_nothing_listens(bring):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    message = refused(lambda: bring(f"http://127.0.0.1:{port}/f?token=abc"))
    assert "no connection (Connection refused), 3 times in a row" in message
    assert "abc" not in message


@pytest.mark.parametrize("url", ["http://", "http://[1/f", "http://127.0.0.1:x/f"])
def test_address_that_is_none_is_refused_at_once(bring, url, capsys):
    assert "the address is not valid" in refused(lambda: bring(url))
    assert capsys.readouterr().err == ""


def test_all_mirrors_and_their_reasons_are_named(server, bring, tmp_path):
    first = server.offer("/a", Answer(status=404))
    second = server.offer("/b", Answer(status=500))
    message = refused(lambda: bring(first, second))
    assert f"{first}: the server answered 404 Not Found; {second}: the server answered 500" in message
    assert "run again" in message
    assert not (tmp_path / "target.zip").exists()


# --------------------------------------------------------------------------------------------------- lies and damage


def test_file_that_is_shorter_than_announced_is_cut(server, bring, tmp_path):
    url = server.offer("/f", Answer(DATA, headers=ETAG, announce=10))
    assert "times in a row" in refused(lambda: bring(url))
    assert not (tmp_path / "target.zip").exists()


def test_file_that_is_longer_than_announced_is_found_by_its_hash(server, bring, got):
    liar = server.offer("/a", Answer(DATA, announce=-10))
    message = refused(lambda: bring(liar, sha256=SHA))
    assert "another SHA-256" in message
    bring(liar, server.offer("/b", GOOD), sha256=SHA)
    assert got()


def test_known_size_refuses_a_mirror_before_the_download(server, bring, got, tmp_path):
    first = server.offer("/a", Answer(DATA + b"x"))
    assert f"it announces {len(DATA) + 1:,} bytes, not {len(DATA):,}" in refused(lambda: bring(first, size=len(DATA)))
    assert part_of(tmp_path) is None
    bring(first, server.offer("/b", GOOD), size=len(DATA))
    assert got()


@pytest.mark.parametrize("data", [DATA + b"x", DATA[:-1], DATA * 20])
def test_known_size_is_checked_where_none_is_announced(server, bring, tmp_path, data):
    url = server.offer("/f", Answer(data, chunked=True))
    message = refused(lambda: bring(url, size=len(DATA)))
    # What is too long is not read to its end, which may never come.
    assert ("more bytes came than there should be" in message) == (len(data) > len(DATA))
    assert not (tmp_path / "target.zip").exists()
    assert part_of(tmp_path) is None


def test_corrupt_bytes_are_fetched_once_more(server, bring, got, capsys):
    bring(server.offer("/f", Answer(OTHER, headers=ETAG), GOOD), sha256=SHA)
    assert got()
    assert "fetching it once more from the start" in capsys.readouterr().err


def test_corrupt_part_from_before_is_fetched_once_more(server, bring, got):
    url = server.offer("/f", Answer(OTHER, headers=ETAG, cut=HALF), GOOD)
    bring(url, sha256=SHA)
    assert got()
    assert server.ranges("/f") == [None, REST, None]


def test_mirror_that_always_corrupts_is_left_after_two_downloads(server, bring, got, tmp_path):
    bad = server.offer("/a", Answer(OTHER, headers=ETAG))
    message = refused(lambda: bring(bad, sha256=SHA))
    assert SHA in message
    assert hashlib.sha256(OTHER).hexdigest() in message
    assert part_of(tmp_path) is None
    assert server.ranges("/a") == [None, None]
    assert bring(bad, server.offer("/b", GOOD), sha256=SHA).url.endswith("/b")
    assert got()


@pytest.mark.parametrize("kind", ["text/html", "Text/HTML; charset=utf-8", "application/xhtml+xml"])
def test_web_page_is_no_archive(server, bring, kind):
    url = server.offer("/f", Answer(b"<html>", headers={"Content-Type": kind}))
    assert "that address gives a web page, not an archive" in refused(lambda: bring(url))


# ------------------------------------------------------------------------------------------------- redirects, proxies


def test_redirects_are_followed_and_the_range_goes_with_them(server, bring, got):
    server.offer("/real", Answer(DATA, headers=ETAG, cut=HALF), GOOD)
    url = server.offer("/f", Answer(status=302, headers={"Location": "/real"}))
    assert bring(url).url == url
    assert got()
    assert server.ranges("/real") == [None, REST]


def test_the_body_of_a_redirect_is_not_read(server, bring, got):
    server.offer("/real", GOOD)
    bring(server.offer("/f", Answer(status=302, headers={"Location": "/real"}, stall=0, announce=1)))
    assert got()


def test_redirect_without_end(server, bring):
    url = server.offer("/f", Answer(status=302, headers={"Location": "/f"}))
    assert "redirects without end" in refused(lambda: bring(url))


def test_redirect_to_a_file_is_refused(server, bring):
    url = server.offer("/f", Answer(status=302, headers={"Location": "file:///etc/hostname"}))
    assert "something other than http" in refused(lambda: bring(url))


def test_https_is_never_left_for_http_and_a_stranger_is_not_trusted(server, bring, got, tmp_path, monkeypatch):
    import ssl

    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    plain = server.offer("/f", GOOD)
    with hostile_server(context) as safe:
        good = safe.offer("/good", GOOD)
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.delenv(name, raising=False)
        assert "its certificate cannot be trusted" in refused(lambda: bring(good))
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
        turn = safe.offer("/turn", Answer(status=307, headers={"Location": plain}))
        assert "from https to http" in refused(lambda: bring(turn))
        assert server.seen == []
        bring(safe.offer("/f", Answer(status=308, headers={"Location": "/good"})))
    assert got()


def test_proxy_of_the_environment_is_used(server, bring, got, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url(""))
    address = "http://pets.invalid/f.zip"
    server.offer(address, GOOD)
    assert bring(address).url == address
    assert got()


# ------------------------------------------------------------------------------------------------------ disk, processes

PROGRAM = """
import shutil
import sys
from pathlib import Path
from catdog.errors import CatdogError
from catdog.transfer import Patience, downloaded
url, target, parts = sys.argv[1:]
try:
    with downloaded([url], Path(target), parts=Path(parts), patience=Patience(stall_timeout=20)) as (file, _):
        shutil.copyfile(file, target)
except CatdogError as error:
    sys.exit(str(error))
"""


def start(url, folder, *, name="target.zip", **options) -> subprocess.Popen:
    """Downloads in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, folder / name, folder / "parts"],
        env=os.environ | {"PYTHONPATH": str(Path(transfer.__file__).parents[1])},
        **{"stderr": subprocess.PIPE, "text": True} | options,
    )


def test_killed_process_is_continued(server, bring, got, tmp_path):
    url = server.offer("/f", Answer(DATA, headers=ETAG, stall=HALF), GOOD)
    process = start(url, tmp_path, stderr=None)
    wait_until(lambda: (part := part_of(tmp_path)) and part.stat().st_size == HALF)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "target.zip").exists()
    bring(url)
    assert got()
    assert server.ranges("/f") == [None, REST]


def test_death_between_a_new_version_and_its_first_byte_mixes_nothing(server, bring, got, monkeypatch):
    url = server.offer("/f", Answer(OTHER, headers=OTHER_ETAG, cut=HALF), Answer(status=404), GOOD)
    refused(lambda: bring(url))

    def write_and_die(path, value):
        path.write_text(json.dumps(value))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transfer, "write_json", write_and_die)
        bring(url)
    bring(url)
    assert got()


@pytest.mark.parametrize("names", [("target.zip", "other.zip"), ("target.zip", "target.zip")])
def test_two_processes_at_once_both_end_with_the_right_file(server, got, tmp_path, names):
    url = server.offer("/f", Answer(DATA, headers=ETAG, stall=HALF), GOOD)
    one = start(url, tmp_path, name=names[0])
    wait_until(lambda: len(server.seen) == 1)
    two = start(url, tmp_path, name=names[1])
    assert two.stderr.readline() == "download: another process is downloading the same file, waiting for it\n"
    server.resume.set()
    for process in (one, two):
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    assert got()
    assert (tmp_path / names[1]).read_bytes() == DATA
    assert server.ranges("/f") == [None, None]


def test_disk_that_is_too_small_stops_before_the_download(server, bring, tmp_path):
    url = server.offer("/f", Answer(DATA, headers={"Content-Length": str(10**16)}))
    message = refused(lambda: bring(url, server.offer("/b", GOOD)))
    assert f"downloading {url} and packing it needs 20,000,000,000 MB" in message
    assert part_of(tmp_path) is None


def test_disk_that_fills_up_is_told_and_continued_later(server, bring, got, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))

    url = server.offer("/f", GOOD)
    process = start(url, tmp_path, preexec_fn=limit)
    message = process.communicate(timeout=120)[1]
    assert "the download cannot be written to" in message
    assert "Traceback" not in message
    assert not (tmp_path / "target.zip").exists()
    bring(url)
    assert got()
    assert server.ranges("/f") == [None, REST]


def test_folder_of_parts_that_is_none_is_told(server, bring, tmp_path):
    (tmp_path / "parts").write_text("")
    assert "cannot be written to" in refused(lambda: bring(server.offer("/f", GOOD)))


def test_terminal_shows_a_bar_that_starts_where_the_part_ends(server, tmp_path, got, bring):
    url = server.offer("/f", Answer(DATA, headers=ETAG, cut=HALF), Answer(status=404), GOOD)
    refused(lambda: bring(url))
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = start(url, tmp_path, stderr=terminal)
    os.close(terminal)
    assert process.wait(120) == 0
    shown = b""
    try:
        while data := os.read(screen, 10_000):
            shown += data
    except OSError:  # how a closed terminal ends
        pass
    os.close(screen)
    assert b"download:  50%|" in shown
    assert b"150k/300k" in shown
    assert b"100%|" in shown
    assert b"300k/300k" in shown
    assert b"B/s]" in shown
    assert got()


# ------------------------------------------------------------------------------------------- whatever the server does

FAULTS = {
    "cut early": Answer(DATA, headers=ETAG, cut=10),
    "cut late": Answer(DATA, headers=ETAG, cut=HALF),
    "too short": Answer(DATA[:-5], headers=ETAG),
    "too long": Answer(DATA + b"more", headers=ETAG),
    "announces more": Answer(DATA, headers=ETAG, announce=10),
    "announces less": Answer(DATA, headers=ETAG, announce=-10),
    "chunks cut": Answer(DATA, headers=ETAG, chunked=True, cut=HALF),
    "ignores ranges": Answer(DATA, headers=ETAG, ranges=False, cut=HALF),
    "wrong range": Answer(DATA, headers={**ETAG, "Content-Range": "bytes 5-9/10"}, cut=HALF),
    "corrupt": Answer(OTHER, headers=ETAG),
    "corrupt, cut": Answer(OTHER, headers=ETAG, cut=HALF),
    "changed": Answer(OTHER, headers=OTHER_ETAG, cut=HALF),
    "empty": Answer(b"", headers=ETAG),
    "page": Answer(b"<html>", headers={"Content-Type": "text/html"}),
    "404": Answer(status=404),
    "416": Answer(status=416),
    "429": Answer(status=429, headers={"Retry-After": "0"}),
    "500": Answer(status=500),
    "hangs up": Answer(hang_up=True),
    "good": GOOD,
}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(st.sampled_from(sorted(FAULTS)), min_size=1, max_size=12), calls=st.integers(1, 3))
def test_any_sequence_of_faults_gives_the_right_file_or_none(server, tmp_path_factory, faults, calls):
    folder = tmp_path_factory.mktemp("any")
    url = server.offer("/f", *(FAULTS[name] for name in faults))
    target = folder / "target.zip"
    for _ in range(calls):
        try:
            download([url], target, parts=folder / "parts", sha256=SHA, patience=Patience(attempts=3, first_wait=0))
        except CatdogError:
            assert not target.exists()
        else:
            assert target.read_bytes() == DATA
            break
    # A good mirror always helps, whatever lies in the parts.
    urls = [url, server.offer("/good", GOOD)]
    download(urls, target, parts=folder / "parts", sha256=SHA, patience=Patience(attempts=3, first_wait=0))
    assert target.read_bytes() == DATA


# ------------------------------------------------------------------------------------------------- identity, public_url

FACTS = {"etag": ETAG["ETag"], "last_modified": ETAG["Last-Modified"], "bytes": len(DATA)}


def test_identity_takes_one_look(server):
    assert identity(server.offer("/f", GOOD)) == FACTS
    assert [seen.method for seen in server.seen] == ["HEAD"]


@pytest.mark.parametrize("status", [400, 403, 404, 405, 501])
@pytest.mark.parametrize("ranges", [True, False])
def test_identity_without_head_asks_for_one_byte(server, status, ranges):
    url = server.offer("/f", Answer(status=status), Answer(DATA, headers=ETAG, ranges=ranges, stall=1))
    assert identity(url, timeout=2) == FACTS
    assert [(seen.method, seen.range) for seen in server.seen] == [("HEAD", None), ("GET", "bytes=0-0")]


def test_identity_of_an_empty_file(server):
    url = server.offer("/f", Answer(status=405), Answer(b"", headers=ETAG))
    assert identity(url) == FACTS | {"bytes": 0}


def test_identity_that_is_not_told(server):
    url = server.offer("/f", Answer(DATA, chunked=True))
    assert identity(url) == {"etag": None, "last_modified": None, "bytes": None}


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=404),
        Answer(status=500),
        Answer(hang_up=True),
        Answer(b"<html>", headers={"Content-Type": "text/html"}),
    ],
)
def test_identity_that_cannot_be_had(server, answer):
    url = server.offer("/f", answer)
    assert f"{url} cannot be reached: " in refused(lambda: identity(url))


def test_identity_follows_a_change(server):
    url = server.offer("/f", GOOD, Answer(OTHER, headers=OTHER_ETAG))
    assert identity(url) != identity(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.org/a/b.zip", "https://example.org/a/b.zip"),
        ("https://user:pass@example.org:8080/b.zip#part", "https://example.org:8080/b.zip"),
        ("https://user:p@ss@example.org/b@c.zip", "https://example.org/b@c.zip"),
        ("https://token@example.org", "https://example.org"),
        ("https://example.org/?id=1AbC-d_9&file=a%20b.zip", "https://example.org/?id=1AbC-d_9&file=a%20b.zip"),
        ("https://example.org/f?access_token=x&v=2&API-Key=y&sig=z", "https://example.org/f?v=2"),
        ("https://example.org/f?X-Amz-Signature=x&X-Amz-Credential=y&x-amz-date=z", "https://example.org/f"),
        ("https://example.org/f?X-Goog-Signature=x&GoogleAccessId=me&Expires=1", "https://example.org/f"),
        ("https://example.org/f?sv=2020&sig=abc&rlkey=k&dl=1", "https://example.org/f?sv=2020&dl=1"),
        ("https://example.org/f?pass%77ord=x&author=me", "https://example.org/f?author=me"),
        ("https://example.org/f?x=eyJhbGciOi.eyJzdWIi.c2lnbmF0dXJl", "https://example.org/f"),
        ("s3://bucket/a b#1.zip?versionId=3", "s3://bucket/a b#1.zip?versionId=3"),
    ],
)
def test_public_url(url, shown):
    assert public_url(url) == shown
    assert public_url(shown) == shown


def test_no_secret_reaches_the_disk_or_a_message(server, bring, tmp_path, capsys):
    server.offer("/f?token=geheim", Answer(DATA, headers=ETAG, cut=HALF), Answer(status=404))
    url = server.url("/f?token=geheim").replace("://", "://user:geheim@")
    message = refused(lambda: bring(url))
    stored = b"".join(path.read_bytes() for path in (tmp_path / "parts").glob("*.json"))
    assert b"etag" in stored
    assert "geheim" not in message + stored.decode() + capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ s3 and other clients


@pytest.fixture(scope="module")
def store():
    """A real S3 server, behind a relay that can cut."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    relay = Relay(server.get_host_and_port()[1])
    yield relay
    relay.close()
    server.stop()


@pytest.fixture
def bucket(store, monkeypatch, tmp_path):
    """An S3 bucket `pets`; `put` fills it."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(transfer, "_OBJECT_STORE_CHUNK", 32_768)
    store.budget = None
    client = boto3.client("s3")
    client.create_bucket(Bucket="pets")
    return client


def test_s3_file_comes_whole(bucket, bring, got):
    bucket.put_object(Bucket="pets", Key="a/f.zip", Body=DATA)
    result = bring("s3://pets/a/f.zip", sha256=SHA, size=len(DATA))
    assert got()
    etag = f'"{hashlib.md5(DATA).hexdigest()}"'
    assert (result.url, result.bytes, result.etag) == ("s3://pets/a/f.zip", len(DATA), etag)
    facts = identity("s3://pets/a/f.zip")
    assert facts == {"etag": etag, "last_modified": result.last_modified, "bytes": len(DATA)}


@pytest.mark.parametrize("data", [DATA, OTHER])
def test_s3_file_is_continued_unless_it_changed(bucket, store, bring, got, data, capsys):
    bucket.put_object(Bucket="pets", Key="f.zip", Body=DATA)
    store.passed, store.budget = 0, HALF
    assert "s3://pets/f.zip: no connection (" in refused(lambda: bring("s3://pets/f.zip"))
    store.budget = None
    bucket.put_object(Bucket="pets", Key="f.zip", Body=data)
    store.passed = 0
    capsys.readouterr()
    bring("s3://pets/f.zip")
    assert got(data)
    assert (store.passed < 0.75 * len(DATA)) == (data == DATA)
    assert ("going on after 0.1 MB" in capsys.readouterr().err) == (data == DATA)


def test_s3_connection_that_is_cut_once_is_tried_again(bucket, store, bring, got):
    bucket.put_object(Bucket="pets", Key="f.zip", Body=DATA)
    store.passed, store.budget = 0, HALF
    threading.Timer(0.5, lambda: setattr(store, "budget", None)).start()
    bring("s3://pets/f.zip", patience=Patience(attempts=30, first_wait=0.05, longest_wait=0.1))
    assert got()


def test_s3_client_does_not_count_attempts_of_its_own(bucket, store, bring):
    store.passed, store.budget, store.connections = 0, 0, 0
    assert "no connection (" in refused(lambda: bring("s3://pets/f.zip"))
    # The transport below it asks a second time at once.
    assert store.connections <= 2 * QUICK.attempts


def test_s3_file_that_is_not_there(bucket, bring, capsys):
    assert "there is no such file" in refused(lambda: bring("s3://pets/none.zip"))
    assert "there is no such file" in refused(lambda: identity("s3://nobody/none.zip"))
    bucket.put_object(Bucket="pets", Key="folder/f.zip", Body=DATA)
    assert "that is a folder" in refused(lambda: bring("s3://pets/folder"))
    assert capsys.readouterr().err == ""


def test_public_s3_file_needs_no_credentials(bucket, bring, got, monkeypatch):
    bucket.put_object(Bucket="pets", Key="open.zip", Body=DATA, ACL="public-read")
    bucket.put_object(Bucket="pets", Key="closed.zip", Body=DATA, ACL="private")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bring("s3://pets/open.zip")
    assert got()
    assert "access is denied" in refused(lambda: bring("s3://pets/closed.zip"))


def test_other_protocols_go_through_fsspec_and_resume(bring, got, tmp_path):
    source = tmp_path / "source.zip"
    source.write_bytes(DATA)
    bring(source.as_uri(), sha256=SHA)
    assert got()
    key = hashlib.sha256(source.as_uri().encode()).hexdigest()
    (tmp_path / "parts" / f"{key}.part").write_bytes(OTHER[:HALF])
    facts = identity(source.as_uri())
    version = {"url": source.as_uri(), "etag": None, "last_modified": facts["last_modified"], "total": facts["bytes"]}
    (tmp_path / "parts" / f"{key}.json").write_text(json.dumps(version))
    bring(source.as_uri())
    # What lay there was continued: it is the first half of the other file.
    assert got(OTHER[: HALF - 1] + DATA[HALF - 1 :])


def test_missing_client_names_its_extra(bring, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = refused(lambda: bring("gs://pets/f.zip"))
    assert "the client for gs addresses is missing: `pip install --editable '.[gs]'`" in message
    assert "the client for gs addresses is missing" in refused(lambda: identity("gs://pets/f.zip"))


def test_unknown_protocol_is_named(bring):
    assert "nonsense" in refused(lambda: bring("nonsense://pets/f.zip"))
