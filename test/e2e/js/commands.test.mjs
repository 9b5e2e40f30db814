import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import { CommandExitError, Sandbox, TimeoutError } from 'e2b'
import { eventually, SLOWER, Transcript } from './common.mjs'

let sandbox
before(async () => { sandbox = await Sandbox.create('base', { timeoutMs: 300_000 }) })
after(async () => { await sandbox?.kill() })

describe('commands', () => {
  it('stream output while the command runs', async () => {
    const out = new Transcript()
    // The second line is written only after the first has been seen here.
    const handle = await sandbox.commands.run('echo one; until [ -e /tmp/go ]; do sleep 0.05; done; echo two >&2; echo three', {
      background: true, onStdout: out.add, onStderr: (s) => out.add(`[${s}]`),
    })
    await out.has('one\n')
    assert.ok(!out.text.includes('three'))
    await sandbox.files.write('/tmp/go', '')
    const result = await handle.wait()
    assert.equal(result.stdout, 'one\nthree\n')
    assert.equal(result.stderr, 'two\n')
    assert.equal(result.exitCode, 0)
    assert.ok(out.text.includes('[two\n]'))
  })

  it('pass the exit code back', async () => {
    await assert.rejects(sandbox.commands.run('echo out; echo err >&2; exit 7'), (err) => {
      assert.ok(err instanceof CommandExitError, String(err))
      assert.equal(err.exitCode, 7)
      assert.equal(err.stdout, 'out\n')
      assert.equal(err.stderr, 'err\n')
      return true
    })
    await assert.rejects(sandbox.commands.run('no-such-program-here'), (err) => err.exitCode === 127)
  })

  it('run as the default user, in its home', async () => {
    const { stdout } = await sandbox.commands.run('id -un; pwd; echo $HOME $USER')
    assert.equal(stdout, 'user\n/home/user\n/home/user user\n')
  })

  it('run as root, in a directory, with variables, when asked', async () => {
    const { stdout } = await sandbox.commands.run('id -un; pwd; echo "$A-$B"', {
      user: 'root', cwd: '/var/log', envs: { A: '1', B: 'two words' },
    })
    assert.equal(stdout, 'root\n/var/log\n1-two words\n')
    assert.equal((await sandbox.commands.run('sudo id -un')).stdout, 'root\n')
  })

  it('refuse a directory that is not there and a user that is not known', async () => {
    await assert.rejects(sandbox.commands.run('true', { cwd: '/no/such/dir' }), /no\/such\/dir/)
    await assert.rejects(sandbox.commands.run('true', { user: 'nobody-such' }), /invalid username|nobody-such/)
  })

  it('go on in the background and are found again', async () => {
    const first = await sandbox.commands.run('while read -r line; do echo "got $line"; done', { background: true, stdin: true })
    const listed = (await sandbox.commands.list()).find((p) => p.pid === first.pid)
    assert.ok(listed, 'the process is listed')
    assert.equal(listed.cmd, '/bin/bash')
    await first.disconnect()

    const out = new Transcript()
    const second = await sandbox.commands.connect(first.pid, { onStdout: out.add })
    assert.equal(second.pid, first.pid)
    await sandbox.commands.sendStdin(first.pid, 'hello\n')
    await out.has('got hello\n')
    await sandbox.commands.closeStdin(first.pid)
    assert.equal((await second.wait()).exitCode, 0)
    assert.ok(!(await sandbox.commands.list()).some((p) => p.pid === first.pid))
  })

  it('are killed by their pid', async () => {
    const handle = await sandbox.commands.run('sleep 600', { background: true })
    const ended = assert.rejects(handle.wait(), CommandExitError)
    assert.equal(await sandbox.commands.kill(handle.pid), true)
    await ended
    await eventually('a second kill finds nothing', async () => !(await sandbox.commands.kill(handle.pid)))
  })

  it('end when their time is over', async () => {
    await assert.rejects(sandbox.commands.run('echo $$ > /tmp/timed.pid; exec sleep 600', { timeoutMs: 1000 * SLOWER }), TimeoutError)
    const pid = (await sandbox.files.read('/tmp/timed.pid')).trim()
    await eventually('the process is gone', async () =>
      (await sandbox.commands.run(`kill -0 ${pid} 2>/dev/null && echo alive || echo gone`, { user: 'root' })).stdout === 'gone\n')
  })

  it('deliver much output whole and in order', async () => {
    const { stdout } = await sandbox.commands.run('seq 1 400000')
    const lines = stdout.trimEnd().split('\n')
    assert.equal(lines.length, 400_000)
    assert.ok(lines.every((line, i) => line === String(i + 1)))
  })

  it('deliver characters that are cut across chunks', async () => {
    const { stdout } = await sandbox.commands.run(`python3 -c "print('é€𝄞' * 30000, end='')"`)
    assert.equal(stdout, 'é€𝄞'.repeat(30_000))
  })

  it('run side by side', async () => {
    const results = await Promise.all(Array.from({ length: 10 }, (_, i) => sandbox.commands.run(`sleep 0.2; echo ${i}`)))
    assert.deepEqual(results.map((r) => r.stdout), Array.from({ length: 10 }, (_, i) => `${i}\n`))
  })
})

describe('terminal', () => {
  const type = (pid, text) => sandbox.pty.sendInput(pid, new TextEncoder().encode(text))

  it('echoes, keeps state, and has the size it was given', async () => {
    const out = new Transcript()
    const pty = await sandbox.pty.create({ cols: 100, rows: 33, onData: out.add, envs: { GREETING: 'hi' }, cwd: '/tmp', timeoutMs: 0 })
    await type(pty.pid, 'echo "<$GREETING $TERM $(pwd) $(stty size)>"\n')
    await out.has('<hi xterm-256color /tmp 33 100>')
    await sandbox.pty.resize(pty.pid, { cols: 61, rows: 17 })
    await eventually('the new size', async () => {
      await type(pty.pid, 'echo "size=$(stty size)"\n')
      return out.text.includes('size=17 61')
    })
    await type(pty.pid, 'exit 3\n')
    await assert.rejects(pty.wait(), (err) => err instanceof CommandExitError && err.exitCode === 3)
  })

  it('is found again with its state after a disconnect', async () => {
    const first = new Transcript()
    const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData: first.add, timeoutMs: 0 })
    await type(pty.pid, 'KEPT=state-$((40 + 2)); echo ready-$KEPT\n')
    await first.has('ready-state-42')
    await pty.disconnect()
    const second = new Transcript()
    const again = await sandbox.pty.connect(pty.pid, { onData: second.add })
    await type(pty.pid, 'echo "still=$KEPT"\n')
    await second.has('still=state-42')
    assert.equal(await sandbox.pty.kill(pty.pid), true)
    await assert.rejects(again.wait())
  })

  it('passes Ctrl-C on', async () => {
    const out = new Transcript()
    const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData: out.add, timeoutMs: 0 })
    // Said by what Ctrl-C is to end: the shell itself would say it before it is there.
    await type(pty.pid, "sh -c 'echo begin-$((1 + 1)); exec sleep 600'\n")
    await out.has('begin-2')
    await type(pty.pid, '\u0003')
    await type(pty.pid, 'echo after-$((2 + 2))\n')
    await out.has('after-4')
    await sandbox.pty.kill(pty.pid)
  })
})
