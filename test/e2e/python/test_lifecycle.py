import os

import pytest
from e2b import (
    AuthenticationException,
    NotFoundException,
    Sandbox,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)

from conftest import MODE, eventually


def drain(paginator):
    found = []
    while paginator.has_next:
        found += paginator.next_items()
    return found


def test_sandbox_runs_and_describes_itself():
    metadata = {"suite": f"py-{MODE}-{os.getpid()}", "odd key": "a b&c=d/é?"}
    with Sandbox.create("base", timeout=120, metadata=metadata, envs={"FROM_CREATE": "yes"}) as sandbox:
        assert sandbox.is_running()
        assert sandbox.commands.run("echo $FROM_CREATE").stdout == "yes\n"
        info = sandbox.get_info()
        assert info.sandbox_id == sandbox.sandbox_id
        assert info.name == "base"
        assert info.state == SandboxState.RUNNING
        assert info.metadata == metadata
        assert 110 < (info.end_at - info.started_at).total_seconds() < 130
        found = drain(Sandbox.list(query=SandboxQuery(metadata=metadata, state=[SandboxState.RUNNING])))
        assert [s.sandbox_id for s in found] == [sandbox.sandbox_id]
        assert drain(Sandbox.list(query=SandboxQuery(metadata={**metadata, "suite": "other"}))) == []
        again = Sandbox.connect(sandbox.sandbox_id)
        assert again.commands.run("echo again").stdout == "again\n"
    assert not sandbox.is_running()


def test_list_goes_page_by_page():
    tag = {"pages": f"py-{MODE}-{os.getpid()}"}
    made = [Sandbox.create("base", timeout=60, metadata=tag) for _ in range(3)]
    try:
        paginator = Sandbox.list(query=SandboxQuery(metadata=tag), limit=2)
        pages = []
        while paginator.has_next:
            pages.append([s.sandbox_id for s in paginator.next_items()])
        newest = [s.sandbox_id for s in reversed(made)]
        assert pages == [newest[:2], newest[2:]]
    finally:
        for s in made:
            s.kill()


def test_set_timeout_ends_the_sandbox_early():
    sandbox = Sandbox.create("base", timeout=60)
    sandbox.set_timeout(1)
    eventually("expiry", lambda: not sandbox.is_running())
    with pytest.raises(NotFoundException):
        sandbox.get_info()


def test_kill_ends_everything_and_a_second_kill_says_so():
    sandbox = Sandbox.create("base", timeout=60)
    assert sandbox.kill() is True
    assert sandbox.is_running() is False
    assert sandbox.kill() is False
    with pytest.raises(NotFoundException):
        Sandbox.connect(sandbox.sandbox_id)
    with pytest.raises((SandboxException, TimeoutException)):
        sandbox.commands.run("true")
    with pytest.raises((SandboxException, TimeoutException)):
        sandbox.files.read("/etc/hostname")


def test_kill_aborts_a_running_command_with_an_error():
    sandbox = Sandbox.create("base", timeout=60)
    handle = sandbox.commands.run("echo started; sleep 600", background=True, timeout=0)
    events = iter(handle)
    assert next(events)[0] == "started\n"
    sandbox.kill()
    with pytest.raises(TimeoutException, match="killed|not found"):
        for _ in events:
            pass


def test_metrics_come_within_30_seconds(sandbox):
    first = eventually("metrics", sandbox.get_metrics, 30)[0]
    assert first.cpu_count >= 1
    assert 0 < first.mem_used <= first.mem_total
    assert 0 <= first.disk_used <= first.disk_total


def test_unknown_template_is_named():
    with pytest.raises(SandboxException, match="no-such-template"):
        Sandbox.create("no-such-template")


def test_wrong_api_key_is_refused():
    with pytest.raises(AuthenticationException):
        Sandbox.create("base", api_key="e2b_" + "0" * 40)


def test_denied_internet_is_shown():
    with Sandbox.create("base", timeout=60, allow_internet_access=False) as sandbox:
        assert sandbox.get_info().allow_internet_access is False
