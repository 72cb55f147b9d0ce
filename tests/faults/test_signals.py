"""A signal stops each command in order, with exit code 75; the same command then goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .kills import prepare

LINE = ("tune", "-r", "run.yaml")


@pytest.fixture
def ready(tmp_path: Path, tiny_model_dir: Path) -> Path:
    prepare(tmp_path, tiny_model_dir)
    return tmp_path


def raising(number: int, real: Callable[..., Any], at: int = 1) -> Callable[..., Any]:
    """The function, but that its `at`-th call sends this process a signal first."""
    calls = iter(range(1, 10_000))

    def wrapper(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            signal.raise_signal(number)
        return real(*arguments, **options)

    return wrapper


@pytest.fixture(autouse=True)
def no_nohup() -> Iterator[None]:
    """Where the tests themselves run under nohup, a hangup is heard all the same."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_finishes_the_step_and_publishes_a_checkpoint(
    name: str, ready: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from itune import training

    number = getattr(signal, name)
    with monkeypatch.context() as patched:
        step = raising(number, training._Loop._step, at=3)
        patched.setattr(training._Loop, "_step", step)
        ended = cli(*LINE, "-s", "training.save_steps=100")
    assert ended.code == 75, ended.err
    assert name in ended.err
    assert "same command" in ended.err
    assert [p.name for p in (ready / "runs/run/checkpoints").iterdir()] == ["000003"]
    assert json.loads((ready / "runs/run/run.json").read_text())["state"] == "interrupted"
    again = cli(*LINE, "-s", "training.save_steps=100")
    assert again.code == 0, again.err
    assert "resuming after step 3 of 12" in again.err
    log = [json.loads(line) for line in (ready / "runs/run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("data.corpus", LINE),
        ("models.load", LINE),
        ("decoding.generate", ("eval", "--run", "runs/run")),
        ("decoding.generate", ("generate", "--run", "runs/run", "Where is cat 3?")),
    ],
)
def test_a_signal_outside_of_training_stops_at_once(
    where: str,
    arguments: tuple[str, ...],
    ready: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import itune.data
    import itune.decoding
    import itune.models

    if arguments is not LINE:
        assert cli(*LINE, "-s", "training.max_steps=1").code == 0
    module, _, name = where.partition(".")
    owner = getattr(itune, module)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, raising(signal.SIGTERM, getattr(owner, name)))
        ended = cli(*arguments)
    assert ended.code == 75, ended.err
    assert "stopped" in ended.err
    assert "Traceback" not in ended.err
    assert cli(*arguments).code == 0


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "goes-on"])
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_signal_that_a_library_takes_for_its_own_fault_stops_all_the_same(
    command: str,
    fails: bool,
    ready: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As transformers does with one that comes while it imports a model's code."""
    from itune import decoding, errors

    assert cli(*LINE, "-s", "training.max_steps=1").code == 0
    real = decoding.generate

    def swallows(*arguments: Any, **options: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            if fails:
                raise errors.ModelError("could not import it") from error
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "generate", swallows)
        question = ["Where is cat 3?"] if command == "generate" else []
        ended = cli(command, "--run", "runs/run", *question)
    assert ended.code == 75, ended.err
    assert "stopped" in ended.err
    assert "could not import" not in ended.err


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A long run in processes of its own, once it has taken its first step."""
    line = [sys.executable, "-m", "itune", *LINE, "-s", "training.max_steps=100000", *options]
    process = subprocess.Popen(
        line, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    log, deadline = folder / "runs/run/log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def test_a_second_signal_ends_the_process_at_once() -> None:
    from itune import signals

    child = os.fork()
    if child == 0:
        with signals.LISTENER.listening(), signals.LISTENER.waiting():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_hangup_that_whoever_started_the_process_ignores_is_ignored() -> None:
    """As under nohup; any other signal asks to stop."""
    from itune import signals

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals.LISTENER.listening():
            signal.raise_signal(signal.SIGHUP)
            others = set(signals.ASKING) - {signal.SIGHUP}
            if signals.LISTENER.asked is None and set(signals.asking()) == others:
                os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


LEAVING = """
import atexit, os, signal
from itune import __main__
from itune.cli import main
def late():
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        signal.raise_signal(getattr(signal, name))
atexit.register(late)
__main__.run()
"""


def test_a_signal_after_the_work_is_done_does_not_take_the_exit_code(tmp_path: Path) -> None:
    for arguments, code in ((["--version"], 0), (["tune", "-r", "no-such-recipe"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", LEAVING, *arguments], cwd=tmp_path, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


SOON = """
import signal, sys
class Late:
    def find_spec(self, name, path, target=None):
        if name == "itune.cli":
            signal.raise_signal(signal.SIGTERM)
sys.meta_path.insert(0, Late())
from itune import __main__
"""


def test_a_signal_before_the_command_has_begun_ends_it_in_order(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOON], cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_process_outlives_the_one_that_started_it(ready: Path) -> None:
    process = started(ready, "--processes", "2")
    own = {each.pid for each in psutil.Process(process.pid).children(recursive=True)}
    assert len(own) >= 2
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 5
    while any(map(psutil.pid_exists, own)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in own if psutil.pid_exists(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_to_the_launcher_ends_all_processes_in_order(ready: Path, name: str) -> None:
    process = started(ready, "--processes", "2", "-s", "training.save_steps=100000")
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert f"error: stopped by {name}" in said
    assert "same command" in said
    assert "Traceback" not in said
    assert "death signal" not in said
    last = json.loads((ready / "runs/run/log.jsonl").read_text().splitlines()[-1])["step"]
    assert (ready / f"runs/run/checkpoints/{last:06}").is_dir()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_within_ten_seconds(ready: Path) -> None:
    process = started(ready, "--processes", "2")
    workers = psutil.Process(process.pid).children(recursive=True)
    victim = next(each for each in workers if each.environ().get("RANK") == "1")
    begun = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 3, said
    assert "process 1 of the run was killed" in said or "another process" in said
    assert "same command" in said or "another process" in said
    assert "Traceback" not in said
    assert json.loads((ready / "runs/run/run.json").read_text())["state"] != "running"


@pytest.mark.slow
def test_runs_started_together_in_one_folder_are_one_run(ready: Path) -> None:
    line = [sys.executable, "-m", "itune", *LINE, "-q"]
    begun = [
        subprocess.Popen(line, cwd=ready, stderr=subprocess.PIPE, text=True) for _ in range(10)
    ]
    ended = [(process.communicate(timeout=240)[1], process.returncode) for process in begun]
    # Whoever comes while the first trains is refused; whoever comes later finds it complete.
    assert sorted({code for _, code in ended}) in ([0], [0, 3])
    for said, code in ended:
        assert "Traceback" not in said
        if code == 3:
            assert "in use by process" in said
    log = [json.loads(text) for text in (ready / "runs/run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))


SLEEPER = """
import os, sys, time
from itune import training
real = training._Loop._gradients
def sleeps(self, step):
    if self.at.step == 6 and os.environ["RANK"] == "1":
        time.sleep(600)
    return real(self, step)
training._Loop._gradients = sleeps
"""


def hung(folder: Path, *, sleeps: bool) -> tuple[int, str, float]:
    """A run of two processes of which the second stops or sleeps: code, message, seconds."""
    options = ["-p", "2", "-s", "launch.hang_timeout=8", "-s", "training.save_steps=2"]
    line = [sys.executable, "-m", "itune", *LINE, "-s", "training.max_steps=100000", *options]
    environment = dict(os.environ)
    if sleeps:
        (folder / "seam").mkdir()
        offline = Path(__file__).parents[1] / "offline" / "sitecustomize.py"
        # Every process reads this first; the fault waits until the trainer is imported.
        (folder / "seam" / "sitecustomize.py").write_text(
            offline.read_text(encoding="utf-8") + LATE.format(source=SLEEPER)
        )
        path = environment["PYTHONPATH"]
        environment["PYTHONPATH"] = os.pathsep.join([str(folder / "seam"), path])
    process = subprocess.Popen(
        line, cwd=folder, env=environment, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    log, deadline = folder / "runs/run/log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    victim = next(each for each in workers if each.environ().get("RANK") == "1")
    if not sleeps:
        victim.suspend()
    begun = time.monotonic()
    _, said = process.communicate(timeout=90)
    took = time.monotonic() - begun
    assert not any(each.is_running() for each in workers)
    return process.returncode, said, took


LATE = """
import importlib.abc, sys
class _Seam(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "itune.training":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def then(module):
                run(module)
                exec({source!r}, {{}})
            spec.loader.exec_module = then
            return spec
import importlib.util
sys.meta_path.insert(0, _Seam())
"""


@pytest.mark.slow
@pytest.mark.parametrize("sleeps", [False, True], ids=["stopped", "asleep"])
def test_a_process_that_stands_still_is_named_and_ends_the_run(ready: Path, sleeps: bool) -> None:
    code, said, took = hung(ready, sleeps=sleeps)
    assert code == 75, said
    assert took < 8 + 7, "the processes are ended after it"
    assert said.count("error:") == 1
    assert "process 1 of 2" in said
    assert ("did not move at all" in said) != sleeps
    last = json.loads((ready / "runs/run/log.jsonl").read_text().splitlines()[-1])["step"]
    stood = re.search(rf"for ([0-9.]+) s, after step {last}, .*hang_timeout \(8 s\)", said)
    assert stood is not None, said
    assert 0.8 * 8 < float(stood[1]) <= 8, "what was seen is told"
    assert json.loads((ready / "runs/run/run.json").read_text())["state"] == "interrupted"
    assert "Traceback" not in said
    from itune import checkpoints

    run_id = json.loads((ready / "runs/run/run.json").read_text())["id"]
    found, warnings = checkpoints.latest(ready / "runs/run/checkpoints", run_id)
    assert found is not None
    assert int(found.name) == last - last % 2
    assert not warnings
