"""No output ends a command: encodings that lack a character, closed and broken streams, poor terminals."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys

import pytest

from cluster.command_line import terminal

CLI = [sys.executable, "-m", "cluster"]
RUN = ["run", "execution=inline", "tracking.enabled=false", "rounds=1", "partition.clients=4", "cohort=2"]
RUN += ["local.epochs=1", "model.name=mlp", "partition.name=iid"]


@pytest.fixture
def streams(monkeypatch):
    """Streams of this process that a test may replace."""
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


def stream_on(file, encoding="ascii"):
    return io.TextIOWrapper(file, encoding=encoding, line_buffering=True)


@pytest.mark.parametrize("keep_going", [False, True])
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"? ? ? ?"), ("latin-1", b"? \xb1 ? ?"), ("cp1252", b"\x89 \xb1 \x86 ?"), ("utf-16-le", None)],
)
def test_what_cannot_be_shown_is_replaced(streams, monkeypatch, encoding, shown, keep_going):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", stream_on(file, encoding))
    terminal.prepare(keep_going=keep_going)
    print("‰ ± † ☃", end="", flush=True)
    assert file.getvalue() == ("‰ ± † ☃".encode(encoding) if shown is None else shown)
    print("\udcff", flush=True)  # half of a name that is no UTF-8


class Broken(io.RawIOBase):
    """A file that takes nothing."""

    def __init__(self, number):
        self.number, self.taken = number, 0

    def writable(self):
        return True

    def write(self, data):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_log_that_takes_no_more_ends_nothing(streams, monkeypatch, number):
    monkeypatch.setattr(sys, "stdout", stream_on(io.BufferedWriter(Broken(number))))
    terminal.prepare(keep_going=True)
    for _ in range(3):
        print("x" * 100_000, flush=True)
    monkeypatch.setattr(sys, "stdout", stream_on(io.BufferedWriter(Broken(number))))
    terminal.prepare(keep_going=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        print("x", flush=True)
    with pytest.raises(OSError, match=os.strerror(number)):  # nothing of it is left to complain at the end
        sys.stdout.close()


def test_a_reader_that_is_gone_ends_nothing(streams, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdout", open(write, "w", encoding="utf-8"))  # noqa: SIM115
    terminal.prepare(keep_going=True)
    os.close(read)
    for _ in range(3):
        print("lost", flush=True)


def test_stand_ins_are_left_alone(streams, monkeypatch):
    class Notebook(io.StringIO):
        pass

    notebook = Notebook()
    monkeypatch.setattr(sys, "stdout", notebook)
    terminal.prepare(keep_going=True)
    assert sys.stdout is notebook


@pytest.mark.parametrize("closing", [">&-", "<&- >&- 2>&-"])
def test_a_run_whose_streams_are_closed_is_computed(tmp_path, cache, closing):
    words = [*CLI, *RUN, f"data.cache={cache}", "--output", str(tmp_path / "run")]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closing}', "sh", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_run_behind_head_is_computed(tmp_path, cache):
    words = [*CLI, *RUN, "rounds=3", f"data.cache={cache}", "--output", str(tmp_path / "run")]
    script = '"$@" | head -n 1; exit ${PIPESTATUS[0]}'
    done = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "dumb"},
        {"TERM": "xterm", "NO_COLOR": "1", "PYTHONIOENCODING": "ascii", "COLUMNS": "10", "LINES": "3"},
    ],
    ids=lambda environment: " ".join(environment.values()),
)
def test_a_run_on_a_poor_terminal_is_computed_and_shown(tmp_path, cache, environment):
    words = [*CLI, *RUN, f"data.cache={cache}", "--output", str(tmp_path / "run")]
    status, shown = on_a_terminal(words, {**os.environ, **environment})
    assert status == 0, shown
    assert "run" in shown
    if "NO_COLOR" in environment:
        assert "\x1b[3" not in shown  # bold and moves of the cursor are no colours
    if environment["TERM"] == "dumb":
        assert "\x1b" not in shown
    if "PYTHONIOENCODING" in environment:
        assert shown.isascii()


def test_a_terminal_that_closes_ends_a_run_after_its_round(tmp_path, cache):
    words = [*CLI, *RUN, "rounds=5000", f"data.cache={cache}", "--output", str(tmp_path / "run")]
    status, _ = on_a_terminal(words, os.environ, until=lambda: (tmp_path / "run" / "rounds.jsonl").exists())
    assert status == 130
    rounds = (tmp_path / "run" / "rounds.jsonl").read_text(encoding="utf-8").count("\n")
    assert (tmp_path / "run" / "checkpoints" / f"round-{rounds:06d}.safetensors").is_file()


def hears_hangups():
    """Tests under nohup hand on that SIGHUP is ignored, which a run respects."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def on_a_terminal(words, environment, until=None):
    """Run a command on a terminal of its own, which closes (and says so twice) where ``until`` says."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        words,
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment,
        start_new_session=True,
        close_fds=True,
        preexec_fn=hears_hangups,
    )
    os.close(child)
    shown = b""
    while until is None or not until():
        try:
            part = os.read(parent, 65536)
        except OSError:  # the last process of the terminal is gone
            break
        shown += part
    os.close(parent)
    if until is not None:
        for _ in range(2):
            os.killpg(process.pid, signal.SIGHUP)
    return process.wait(timeout=240), shown.decode("utf-8", errors="replace")
