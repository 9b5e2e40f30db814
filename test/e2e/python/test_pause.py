import os

import pytest
from e2b import NotFoundException, Sandbox, SandboxState

from conftest import MODE, eventually


def test_pause_and_resume_keep_processes_and_files():
    with Sandbox.create("base", timeout=120) as sandbox:
        sandbox.files.write("/home/user/kept", "content")
        pid = sandbox.commands.run("sleep 600", background=True).pid
        sandbox.pause()
        assert not sandbox.is_running()
        assert sandbox.get_info().state == SandboxState.PAUSED
        again = Sandbox.connect(sandbox.sandbox_id)
        assert again.get_info().state == SandboxState.RUNNING
        assert again.files.read("/home/user/kept") == "content"
        assert pid in [p.pid for p in again.commands.list()]


def test_a_sandbox_is_paused_at_the_end_of_its_time():
    sandbox = Sandbox.create("base", timeout=2, lifecycle={"on_timeout": "pause"})
    try:
        eventually("the pause", lambda: sandbox.get_info().state == SandboxState.PAUSED)
        assert Sandbox.connect(sandbox.sandbox_id).commands.run("echo there").stdout == "there\n"
    finally:
        assert sandbox.kill() is True
    with pytest.raises(NotFoundException):
        Sandbox.connect(sandbox.sandbox_id)


def test_snapshots_and_forks_are_copies_of_their_own():
    with Sandbox.create("base", timeout=120) as sandbox:
        sandbox.files.write("/home/user/kept", "content")
        name = f"py-{MODE}-{os.getpid()}"
        snapshot = sandbox.create_snapshot(name=name)
        with Sandbox.create(name, timeout=60) as copy:
            assert copy.files.read("/home/user/kept") == "content"
        assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
        assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False
        forks = sandbox.fork(count=2, timeout=60)
        try:
            assert len({sandbox.sandbox_id, *(f.sandbox_id for f in forks)}) == 3
            forks[0].files.write("/home/user/kept", "fork")
            assert sandbox.files.read("/home/user/kept") == "content"
            assert forks[1].files.read("/home/user/kept") == "content"
        finally:
            for fork in forks:
                fork.kill()
