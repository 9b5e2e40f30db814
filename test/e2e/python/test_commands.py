import asyncio

import pytest
from e2b import AsyncSandbox, CommandExitException, NotFoundException, PtySize, TimeoutException

from conftest import eventually


def test_output_streams_while_the_command_runs(sandbox):
    handle = sandbox.commands.run(
        "echo one; until [ -e /tmp/py-go ]; do sleep 0.05; done; echo two >&2; echo three",
        background=True,
    )
    events = iter(handle)
    assert next(events)[0] == "one\n"
    sandbox.files.write("/tmp/py-go", "")  # only now can the rest come
    seen = []
    result = handle.wait(on_stdout=seen.append, on_stderr=lambda s: seen.append(f"[{s}]"))
    assert (result.stdout, result.stderr, result.exit_code) == ("one\nthree\n", "two\n", 0)
    assert "[two\n]" in seen and "three\n" in seen


def test_exit_code_comes_back(sandbox):
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.run("echo out; echo err >&2; exit 7")
    assert (caught.value.exit_code, caught.value.stdout, caught.value.stderr) == (7, "out\n", "err\n")


def test_user_directory_and_variables_are_as_asked(sandbox):
    assert sandbox.commands.run("id -un; pwd").stdout == "user\n/home/user\n"
    result = sandbox.commands.run("id -un; pwd; echo $A", user="root", cwd="/var", envs={"A": "two words"})
    assert result.stdout == "root\n/var\ntwo words\n"


def test_background_command_is_found_again(sandbox):
    first = sandbox.commands.run('while read -r l; do echo "got $l"; done', background=True, stdin=True)
    assert first.pid in [p.pid for p in sandbox.commands.list()]
    first.disconnect()
    second = sandbox.commands.connect(first.pid)
    sandbox.commands.send_stdin(first.pid, "hello\n")
    assert next(iter(second))[0] == "got hello\n"
    sandbox.commands.close_stdin(first.pid)
    assert second.wait().exit_code == 0


def test_input_is_streamed(sandbox):
    handle = sandbox.commands.run("sha256sum", background=True, stdin=True)
    sandbox.commands.stream_input(handle.pid, (b"x" * 1000 for _ in range(1000)))
    sandbox.commands.close_stdin(handle.pid)
    want = sandbox.commands.run("head -c 1000000 /dev/zero | tr '\\0' x | sha256sum").stdout
    assert handle.wait().stdout == want


def test_command_is_killed_by_its_pid(sandbox):
    handle = sandbox.commands.run("sleep 600", background=True)
    assert sandbox.commands.kill(handle.pid) is True
    with pytest.raises(CommandExitException):
        handle.wait()
    eventually("a second kill finds nothing", lambda: not sandbox.commands.kill(handle.pid))


def test_command_ends_when_its_time_is_over(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 600", timeout=1)


def test_much_output_is_whole_and_in_order(sandbox):
    stdout = sandbox.commands.run("seq 1 200000").stdout
    assert stdout.split() == [str(i) for i in range(1, 200_001)]


def test_terminal_has_size_and_state_and_is_found_again(sandbox):
    pty = sandbox.pty.create(PtySize(rows=33, cols=100), timeout=0)
    screen = ""

    def until(handle, text):
        nonlocal screen
        events = iter(handle)
        while text not in screen:  # it may have come with what was waited for before
            _, _, data = next(events)
            screen += (data or b"").decode(errors="replace")

    sandbox.pty.send_stdin(pty.pid, b'echo "size=$(stty size)"; KEPT=state-$((40 + 2)); echo $KEPT\n')
    until(pty, "size=33 100")
    until(pty, "state-42")
    pty.disconnect()
    again = sandbox.pty.connect(pty.pid, timeout=0)
    sandbox.pty.resize(pty.pid, PtySize(rows=17, cols=61))
    sandbox.pty.send_stdin(pty.pid, b'echo "still=$KEPT $(stty size)"\n')
    until(again, "still=state-42 17 61")
    assert sandbox.pty.kill(pty.pid) is True
    with pytest.raises(CommandExitException):
        again.wait()


def test_unknown_process_is_not_found(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(999_999)
    assert sandbox.commands.kill(999_999) is False


def test_asynchronous_client_works_too():
    async def main():
        sandbox = await AsyncSandbox.create("base", timeout=60)
        try:
            results = await asyncio.gather(*(sandbox.commands.run(f"sleep 0.2; echo {i}") for i in range(5)))
            assert [r.stdout for r in results] == [f"{i}\n" for i in range(5)]
            seen = asyncio.Event()
            watch = await sandbox.files.watch_dir("/home/user", lambda event: seen.set())
            await sandbox.files.write("noticed", "x")
            await asyncio.wait_for(seen.wait(), 15)
            await watch.stop()
        finally:
            assert await sandbox.kill()

    asyncio.run(main())
